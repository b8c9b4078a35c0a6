import pytest
from experiment_runs import TINY

from spark_jax.experiments import configuration
from spark_jax.reports import plots


@pytest.fixture(autouse=True)
def no_plots_of_runs(request, monkeypatch):
    """Plots take two thirds of a tiny run's time; `tests/reports/test_plots.py` is about them."""
    if "draws" not in request.keywords:
        monkeypatch.setattr(plots, "training_curves", lambda metrics, folder: [])
        monkeypatch.setattr(plots, "stage1_summary", lambda *summary, **options: None)


@pytest.fixture(scope="session")
def tiny():
    """The demo's configuration, a thousand times smaller, on the shipped base."""
    return configuration.changed(configuration.load_config("configs/demo.py"), TINY)


@pytest.fixture(scope="session")
def stage1(tiny, made_once):
    """A finished stage I run with all seven methods."""
    from spark_jax.experiments import generate_verifications

    return made_once("stage1", lambda path: generate_verifications.run(tiny, path))


@pytest.fixture(scope="session")
def reward_models(tiny, stage1, made_once):
    """kind → checkpoint folder, made when it is first asked for."""
    from spark_jax.experiments import train_prm

    def train(kind):
        changes = {"prm.data": str(stage1), "prm.kind": kind}
        config = configuration.changed(tiny, changes)
        return made_once(f"reward_model_{kind}", lambda path: train_prm.run(config, path))

    class Models(dict):
        def __missing__(self, kind):
            self[kind] = str(train(kind) / "model")
            return self[kind]

    return Models()
