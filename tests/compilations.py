"""What XLA compiles, by name."""

import jax


class Compilations:
    """Names what XLA compiles inside the block."""

    def __enter__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, duration, **how):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(how.get("fun_name", "?"))
