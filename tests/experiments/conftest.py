import pytest
from experiment_runs import TINY

from spark_jax.experiments import configuration


@pytest.fixture(scope="session")
def tiny():
    """The demo's configuration, a thousand times smaller, on the shipped base."""
    return configuration.changed(configuration.load_config("configs/demo.py"), TINY)


@pytest.fixture(scope="session")
def stage1(tiny, tmp_path_factory):
    """A finished stage I run with all seven methods."""
    from spark_jax.experiments import generate_verifications

    path = tmp_path_factory.mktemp("stage1")
    generate_verifications.run(tiny, path)
    return path


@pytest.fixture(scope="session")
def reward_models(tiny, stage1, tmp_path_factory):
    """kind → checkpoint folder."""
    from spark_jax.experiments import train_prm

    folders = {}
    for kind in ("orm", "prm", "prm_cot"):
        path = tmp_path_factory.mktemp(kind)
        changes = {"prm.data": str(stage1), "prm.kind": kind}
        train_prm.run(configuration.changed(tiny, changes), path)
        folders[kind] = str(path / "model")
    return folders
