"""How an experiment starts: its configuration from file and command line, and its models.

    python -m spark_jax.experiments.<name> --config=configs/x.py --config.field=value

A configuration that cannot work is refused before anything is computed.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
import jax
from absl import app
from ml_collections import config_flags

from spark_jax.experiments import checks, configuration, progress
from spark_jax.experiments.configuration import Config, ConfigError, make_or_refuse
from spark_jax.parallel import processes
from spark_jax.training import preemption
from spark_jax.training.run_folder import OtherRun


def main(
    run: Callable[..., Any], *wanted: Callable[[Config], None], unit: str | None = None
) -> None:
    """Reads `--config`, makes the checks, and calls `run(config, Path(config.run_dir))`; with a
    `unit` of progress, under a bar and with its `on_progress`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    flag = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")

    def start(_: Sequence[str]) -> None:
        absl.logging.set_verbosity(absl.logging.WARNING)  # orbax reports every step at INFO
        compiled = CompiledPrograms()
        make_or_refuse("several processes", processes.start)
        make_or_refuse("preemption", preemption.listen)
        quiet_unless_main()
        for check in (checks.check_common, *wanted):
            check(flag.value)
        path = Path(flag.value.run_dir)
        if unit is None:
            run(flag.value, path)
        else:
            with progress.shown(str(path), unit) as on_progress:
                run(flag.value, path, on_progress)
        processes.finish()
        note_completion()
        say(f"{path}: {compiled}")
        say(f"{path}: complete")

    def guarded(arguments: Sequence[str]) -> None:
        try:
            start(arguments)
        except (ConfigError, OtherRun, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
        except preemption.Preempted:
            say(f"{flag.value.run_dir}: stopped and saved; the same command goes on with it")
            raise
        except Exception as error:
            if jax.process_count() == 1:
                raise
            _end_among_others(error)

    try:
        arguments = check_arguments(sys.argv)
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    app.run(guarded, argv=arguments)


def say(text: str) -> None:
    """A line on stderr, of process 0."""
    if processes.is_main():
        print(text, file=sys.stderr, flush=True)


class CompiledPrograms:
    """Counts what XLA compiles in this process from now on."""

    def __init__(self) -> None:
        self.programs, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def __str__(self) -> str:
        return f"{self.programs} programs compiled, in {self.seconds:.0f} s of all threads"

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1
            self.seconds += duration_secs


COMPLETED = "SPARK_JAX_COMPLETED"


def note_completion() -> None:
    """Creates the file that `SPARK_JAX_COMPLETED` names, where it names one: the run is complete. A
    run that saved because it was told to stop also ends with status 0, but without this file; the
    scripts of `experiments/pods` start that one again."""
    if file := os.environ.get(COMPLETED):
        Path(file).touch()


def quiet_unless_main() -> None:
    """Warnings and logs are written by process 0, errors by all."""
    if not processes.is_main():
        absl.logging.set_verbosity(absl.logging.ERROR)
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config` resolved: a path, or a file of the installed configs.

    Raises:
      FileNotFoundError: no such config file.
      ConfigError: no `--config`, or a field that the config does not have, with its name.
    """
    if "--config" in arguments[:-1]:  # `--config FILE`, as absl also allows
        at = list(arguments).index("--config")
        arguments = [*arguments[:at], f"--config={arguments[at + 1]}", *arguments[at + 2 :]]
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if not files:
        raise ConfigError("--config=FILE is missing, such as --config=configs/demo.py")
    path = configuration.config_path(files[-1])
    config = configuration.load_config(path)
    for name in (argument.partition("=")[0] for argument in arguments):
        if name.startswith("--config."):
            field = name.removeprefix("--config.")
            try:
                configuration.value_of(config, field)
            except (AttributeError, KeyError, TypeError) as error:
                why = " ".join(str(error.args[0]).split())  # ml_collections: "Did you mean ..."
                raise ConfigError(f"config field {field!r} is unknown: {why}") from None
    return [f"--config={path}" if a.startswith("--config=") else a for a in arguments]


def _end_among_others(error: Exception) -> NoReturn:
    """Ends this process of several at once: at a regular exit it would wait for the others."""
    traceback.print_exception(error)
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} ends. If another one died "
        "first, its log says why. Start all of them again: the run goes on from its last "
        "checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
