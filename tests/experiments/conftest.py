import pytest

from spark_jax.experiments import launch
from spark_jax.verification.aggregate import AGGREGATIONS

TINY = {
    "generate.num_problems": 4,
    "generate.samples_per_problem": 2,
    "generate.chunk_size": 2,
    "verify.methods": tuple(AGGREGATIONS),
    "verify.samples_per_solution": 3,
    "verify.report_sample_counts": (1, 3),
    "verify.chunk_size": 2,
    "prm.steps": 2,
    "prm.batch_size": 4,
    "rl.steps": 2,
    "rl.num_problems": 8,
    "rl.prompts_per_step": 2,
    "rl.group_size": 4,
    "evaluate.num_problems": 4,
    "evaluate.samples_per_problem": 2,
    "evaluate.num_solutions": 4,
    "pipeline.seeds": (0, 1),
}


@pytest.fixture(scope="session")
def tiny():
    """The demo's configuration, a thousand times smaller, on the shipped base."""
    return launch.changed(launch.load_config("configs/demo.py"), TINY)


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
        train_prm.run(launch.changed(tiny, changes), path)
        folders[kind] = str(path / "model")
    return folders
