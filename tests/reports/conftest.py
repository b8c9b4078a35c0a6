"""Run folders as the experiments leave them, with made-up scores, and what is drawn of them."""

import copy

import numpy as np
import pytest
from matplotlib.figure import Figure

from spark_jax.reports import study
from spark_jax.training.metrics import MetricsWriter
from spark_jax.training.run_folder import RunFolder
from spark_jax.verification.aggregate import AGGREGATIONS

SEEDS, COUNTS, STEPS = (0, 1, 2), (1, 4, 16), (1, 2, 3, 4)
ARMS = {  # as a ConfigDict hands them out, by the alphabet
    "majority_vote": "majority_vote",
    "prm_grpo": "process_aware_outcome",
    "prm_spro": "process_aware_outcome",
    "random": "random",
    "rule_based": "rule_based",
}
FOLDERS = study.Folders(
    lambda seed: f"{seed}/stage1",
    lambda seed, method: f"{seed}/prm_{method}",
    lambda seed, arm: f"{seed}/rl_{arm}",
)


@pytest.fixture
def drawn(monkeypatch):
    """File name → the figure that would have been saved there, not rendered: that is slow."""
    figures = {}

    def remember(figure, path, **options):
        figures[path.stem] = figure

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


@pytest.fixture(scope="module")
def collected():
    """What `pipeline` has made of arguments without functions."""
    return {}


@pytest.fixture
def pipeline(tmp_path, collected):
    """Writes the runs and collects them. `changes`: summary or metrics row of a run → other."""
    made = []

    def once(*args, **changes):
        if any(map(callable, changes.values())):
            return make(*args, **changes)
        asked = repr((args, changes))
        if asked not in collected:
            collected[asked] = make(*args, **changes)
        return copy.deepcopy(collected[asked])

    def make(
        methods=("single", "step_consistency"),
        arms=ARMS,
        seeds=SEEDS,
        counts=COUNTS,
        orm=False,
        stage1=lambda seed, summary: summary,
        prm=lambda seed, method, summary: summary,
        rl=lambda seed, arm, step, row: row,
    ):
        path = tmp_path / str(len(made))
        made.append(path)
        for seed in seeds:
            config = {"task": "arithmetic_chains", "verify": {"samples_per_solution": 16}}
            summary = stage1_summary(methods, counts, seed)
            write(path / FOLDERS.stage1(seed), config, stage1(seed, summary))
            for method in ("base", *methods):
                scores = prm_scores(method, seed, orm and method != "base")
                summary = prm(seed, method, scores)
                held_out = summary if method == "base" else {"held_out": summary}
                write(path / FOLDERS.prm(seed, method), {}, held_out)
            for arm, reward in arms.items():
                write(path / FOLDERS.rl(seed, arm), {"rl": {"reward": reward}}, {})
                write_metrics(path / FOLDERS.rl(seed, arm), seed, arm, rl)
        return study.collect(
            path, seeds=seeds, methods=("base", *methods), arms=list(arms), folders=FOLDERS
        )

    return once


def stage1_summary(methods, counts, seed):
    def report(method, n):
        score = 0.8 + 0.005 * n * (method == "step_consistency") + 0.01 * seed
        return {
            "step_accuracy": score,
            "overall_accuracy": score - 0.1,
            "derived_outcome_accuracy": score - 0.2,
            "detection_rate": 0.7,
            "validity_rate": 0.9,
            "warning": None,
        }

    votes = [m for m in methods if not AGGREGATIONS[m].critique]
    by_sample_count = {str(n): {m: report(m, n) for m in votes} for n in counts if votes}
    return {"methods": {m: report(m, 16) for m in methods}, "by_sample_count": by_sample_count}


def prm_scores(method, seed, orm):
    score = 0.8 + 0.1 * (method == "step_consistency") + 0.01 * seed
    scores = {"overall_accuracy": {"estimate": score, "low": score - 0.1, "high": score + 0.1}}
    return scores if orm else {**scores, "error_acc": score, "correct_acc": score, "f1": score}


def write(path, config, summary):
    RunFolder.open(path, config).write_summary(summary)


def write_metrics(path, seed, arm, change):
    with MetricsWriter(path, tensorboard=False) as metrics:
        metrics.scalars(0, change(seed, arm, 0, {"eval/accuracy": 0.5 + 0.01 * seed}))
        for step in STEPS:
            rate = 0.05 * step * (arm != "random") + np.cos(seed + step) / 100
            row = {
                "reward/mean": rate,
                "truth/accuracy": 0.5 + rate,
                "response/length": 30 + rate,
                "policy/entropy": 0.1 - rate / 10,
                "policy/loss": -rate,
                "policy/grad_norm": 0.1,
                "policy/logprob_gap_max": 1e-6,
                "format/failed": 0.01,
                "hacking/too_few_steps": 0.02,
                "hacking/steps_per_response": 4.0,
            }
            if step in (2, 4):
                row |= {"eval/accuracy": 0.5 + rate, "eval/response_length": 31 + rate}
            metrics.scalars(step, change(seed, arm, step, row))
