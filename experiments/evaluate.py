"""How good a policy or a reward model is, on held-out problems of the task or on benchmarks.

    python -m spark_jax.experiments.evaluate --config=configs/demo.py \
        --config.run_dir=runs/evaluate --config.model=runs/demo/seed0/rl_prm_grpo/model
    python -m spark_jax.experiments.evaluate --config=configs/demo.py \
        --config.run_dir=runs/evaluate_prm --config.model=runs/demo/seed0/prm_single/model \
        --config.evaluate.what=reward_model
    python -m spark_jax.experiments.evaluate --config=configs/demo.py \
        --config.run_dir=runs/processbench --config.model=runs/prm/model --config.task=gsm8k \
        --config.evaluate.what=processbench --config.evaluate.votes=8 \
        --config.decode.max_new_tokens=2048
    python -m spark_jax.experiments.evaluate --config=configs/demo.py \
        --config.run_dir=runs/benchmarks --config.model=runs/rl/model \
        --config.evaluate.what=benchmarks --config.decode.max_new_tokens=2048

`evaluate.what` is one of

    policy         a policy on held-out problems of the task
    benchmarks     a policy on the six benchmarks of the SPARK paper
    reward_model   a reward model on held-out solutions by `evaluate.generator`
    processbench   a reward model, or (evaluate.kind=verifier) any instruct model, on ProcessBench

Prints and writes `summary.json`, with 95 % bootstrap intervals over problems. ProcessBench and
benchmarks read local files in $SPARK_JAX_DATA (benchmarks that are not there: the hub, but for
HF_HUB_OFFLINE=1); they also write `table.md`, and what was sampled as JSON lines, so that a second
start goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from spark_jax import response_format, tasks
from spark_jax.data.formats import Sample, TextFormat
from spark_jax.data.records import Problem, SamplingSettings, Solution
from spark_jax.decoding.generate import ladder
from spark_jax.evaluation import benchmarks, intervals, processbench
from spark_jax.evaluation.processbench import ProcessBenchSample
from spark_jax.experiments import checks, configuration, launch, loading, progress
from spark_jax.experiments.base_config import FORMER_DEFAULTS
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.progress import OnProgress
from spark_jax.models.config import ModelConfig
from spark_jax.parallel import processes, sharding
from spark_jax.prm.evaluate import Judge, JudgeKind, evaluate_reward_model
from spark_jax.prm.processbench import evaluate_processbench
from spark_jax.reports import benchmarks as tables
from spark_jax.scoring import token_logprobs
from spark_jax.steps import step_texts
from spark_jax.text_generation import SampledText, TextModel, longest_prompt, text_sampler
from spark_jax.training import programs, spread
from spark_jax.training.run_folder import RunFolder

HELD_OUT_SEED = 1_000_003  # added to the run's seed: evaluation never samples what training samples

Benchmarks = tuple[dict[str, tuple[tasks.Task, list[Problem]]], dict[str, str]]
Splits = tuple[dict[str, list[ProcessBenchSample]], dict[str, str]]


@configuration.on_mesh
def run(config: Config, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Evaluates `config.model` as `config.evaluate.what` says; returns the summary."""
    checks.check_evaluate(config)
    config = configuration.sub_config(config, "evaluate", "generate", "verify", "prm")
    what, kind = config.evaluate.what, config.evaluate.kind or config.prm.kind
    task = loading.load_task(config)
    data: Any = (
        DATA[what](config) if what in DATA else None
    )  # what is missing is said before all else
    model = loading.load_text_model(config, config.model)
    folder = RunFolder.open(path, config, FORMER_DEFAULTS)
    if (finished := folder.read_summary()) is not None:
        return finished
    if on_progress:
        on_progress(0, 1)
    shown = loading.for_model(task, model.tokenizer, config)
    if what == "policy":
        summary = policy_scores(config, shown, model) | {"data": task.data_counts("eval")}
    elif what == "reward_model":
        held_out = held_out_solutions(config, task)
        summary = reward_model_scores(config, shown, model, kind, *held_out)
    elif what == "processbench":
        summary = processbench_scores(config, shown, model, kind, data, path, on_progress)
    else:
        summary = benchmark_scores(config, model, data, path, on_progress)
    folder.write_summary(summary)
    if what in TABLES and processes.is_main():
        (path / "table.md").write_text(tables.markdown(TABLES[what](summary)))
    return summary


def policy_scores(config: Config, task: tasks.Task, model: TextModel) -> dict[str, Any]:
    """Accuracy on held-out problems: avg@k with its interval, pass@k, maj@k; length and format.

    `task` is as the model is shown it. See `evaluation.benchmarks.policy_scores`: what needs
    references is None for a task that has none.
    """
    problems = task.problems(config.evaluate.num_problems, config.seed, "eval")
    samples = text_sampler(model, configuration.decode_options(config))(
        [task.text_format.solve_prompt(problem) for problem in problems],
        samples_per_prompt=samples_per_problem(config, config.evaluate.samples_per_problem),
        settings=policy_settings(config),
        seed=config.seed + HELD_OUT_SEED,
    )
    grade = functools.partial(graded_together, task.text_format)
    return benchmarks.policy_scores(
        task.text_format, problems, samples, config.evaluate.answer_from, grade
    )


def graded_together(
    text_format: TextFormat, problems: Sequence[benchmarks.Answered]
) -> list[benchmarks.Graded]:
    """`evaluation.benchmarks.grade_answers`, of which every process does its share."""
    return processes.share(
        problems, functools.partial(benchmarks.grade_answers, text_format.same_answer)
    )


def benchmark_scores(
    config: Config,
    model: TextModel,
    data: Benchmarks,
    path: Path,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """`evaluation.benchmarks.policy_scores` of each benchmark, and their mean accuracy.

    Responses are kept in `responses/<benchmark>.jsonl`. Progress is in problems.
    """
    formats = {
        name: loading.for_model(task, model.tokenizer, config).text_format
        for name, (task, _) in data[0].items()
    }

    def graded(name: str, problems: Sequence[benchmarks.Answered]) -> list[benchmarks.Graded]:
        return graded_together(formats[name], problems)

    work = functools.partial(_benchmark_scores, config, data, formats, path, on_progress)
    return processes.lead(work, text_sampler(model, configuration.decode_options(config)), graded)


def _benchmark_scores(
    config: Config,
    data: Benchmarks,
    formats: Mapping[str, TextFormat],
    path: Path,
    on_progress: OnProgress | None,
    sample: Sample,
    graded: Callable[[str, Sequence[benchmarks.Answered]], Sequence[benchmarks.Graded]],
) -> dict[str, Any]:
    present, missing = data
    wanted = config.evaluate.benchmarks.samples_per_problem
    total, done, scores = sum(len(problems) for _, problems in present.values()), 0, {}
    for name, (_, problems) in present.items():
        responses = benchmarks.sample_responses(
            sample,
            problems,
            formats[name],
            samples_per_problem=samples_per_problem(
                config, wanted.get(name, config.evaluate.samples_per_problem)
            ),
            settings=policy_settings(config),
            seed=config.seed + HELD_OUT_SEED,
            path=path / "responses" / f"{name}.jsonl",
            model=config.model,
            chunk_size=config.evaluate.chunk_size,
            on_progress=on_progress and _shifted(on_progress, done, total),
        )
        scores[name] = benchmarks.policy_scores(
            formats[name],
            problems,
            responses,
            config.evaluate.answer_from,
            functools.partial(graded, name),
        )
        done += len(problems)
    shares = {
        name: [share for share in score["correct_per_problem"] if share is not None]
        for name, score in scores.items()
        if score["num_with_reference"]
    }
    mean = dataclasses.asdict(benchmarks.mean_accuracy(shares)) if shares else None
    return {
        "benchmarks": scores,
        "missing": missing,
        "mean_accuracy": mean,
        "answer_from": config.evaluate.answer_from,
    }


def held_out_solutions(config: Config, task: tasks.Task) -> tuple[list[Problem], list[Solution]]:
    """Solutions of held-out problems by the generator, one a problem, with what is known of them.

    `task` is as it stands: the generator has its own way to be shown it.
    """
    problems = task.problems(config.evaluate.num_solutions, config.seed, "eval")
    generator = loading.load_text_model(config, config.evaluate.generator)
    shown = loading.for_model(task, generator.tokenizer, config).text_format
    samples = text_sampler(generator, configuration.decode_options(config))(
        [shown.solve_prompt(problem) for problem in problems],
        samples_per_prompt=1,
        settings=loading.sampling(config, config.generate),
        seed=config.seed + HELD_OUT_SEED,
    )
    solutions = [
        as_solution(task, problem, group[0])
        for problem, group in zip(problems, samples, strict=True)
    ]
    return problems, tasks.with_labels(task, problems, solutions)


def reward_model_scores(
    config: Config,
    task: tasks.Task,
    model: TextModel,
    kind: JudgeKind,
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
) -> dict[str, Any]:
    """ProcessBench's scores, greedy and by `evaluate.votes`; overall verdicts; soft scores.

    `task` is as the model is shown it. See `prm.evaluate.judgement_scores`, which says what is left
    out where step labels or truth are unknown; `overall_accuracy` gets its interval here.
    """

    def work(judge: Judge) -> dict[str, Any]:
        seed = config.seed + HELD_OUT_SEED
        return evaluate_reward_model(judge, problems, solutions, seed=seed)

    scores = judged(config, task, model, kind, work)
    right = [hit for hit in scores.pop("per_solution")["overall_right"] if hit is not None]
    accuracy: dict[str, float | None] = {"estimate": None, "low": None, "high": None}
    if right:
        accuracy |= dataclasses.asdict(intervals.bootstrap_interval(np.array(right)))
    return scores | {"overall_accuracy": accuracy}


def processbench_scores(
    config: Config,
    task: tasks.Task,
    model: TextModel,
    kind: JudgeKind,
    data: Splits,
    path: Path,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """See `prm.processbench.evaluate_processbench`; predictions in `predictions/<split>.jsonl`."""
    splits, missing = data

    def work(judge: Judge) -> dict[str, Any]:
        return evaluate_processbench(
            judge,
            splits,
            seed=config.seed + HELD_OUT_SEED,
            folder=path / "predictions",
            model=config.model,
            chunk_size=config.evaluate.chunk_size,
            on_progress=on_progress,
        )

    scores = judged(config, task, model, kind, work)
    return {"kind": kind, **scores, "missing": missing}


def judged(
    config: Config,
    task: tasks.Task,
    model: TextModel,
    kind: JudgeKind,
    work: Callable[[Judge], dict[str, Any]],
) -> dict[str, Any]:
    """What `work` makes of the model as a judge; see `processes.lead` for several processes."""
    judge = make_judge(config, task, model, kind)

    def lead(sample: Sample, token_logprobs: Any) -> dict[str, Any]:
        return work(dataclasses.replace(judge, sample=sample, token_logprobs=token_logprobs))

    return processes.lead(lead, judge.sample, functools.partial(score_in_batches, model))


def make_judge(config: Config, task: tasks.Task, model: TextModel, kind: JudgeKind) -> Judge:
    """The model as a judge that votes as `evaluate.votes` says and gives soft scores.

    A prompt that leaves too few positions for `decode.max_new_tokens` does not fit.
    """
    options = configuration.decode_options(config)
    limit = longest_prompt(model.config, config.decode.max_new_tokens, options)
    return Judge(
        sample=text_sampler(model, options),
        text_format=task.text_format,
        kind=kind,
        settings=loading.sampling(config, config.verify),
        votes=config.evaluate.votes,
        token_logprobs=functools.partial(score_in_batches, model),
        tokenizer=model.tokenizer,
        fits=lambda prompt: len(model.tokenizer.encode(prompt, add_special_tokens=False)) <= limit,
    )


def score_in_batches(model: TextModel, tokens: np.ndarray, max_tokens: int = 2**15) -> np.ndarray:
    """Log-probs [n, T-1] of right-padded tokens [n, T], at most `max_tokens` at a time.

    Shapes come from the decoder's ladder, so that few programs are compiled.
    """
    n, length = tokens.shape
    width = ladder(length)
    shards = sharding.batch_shards()
    rows = min(ladder(n), max(1, max_tokens // width))
    rows = -(-rows // shards) * shards
    padded = np.zeros((-(-n // rows) * rows, width), np.int32)
    padded[:n, :length] = tokens
    score = compiled_logprobs(model.config)
    scored = [
        np.asarray(score(model.params, spread.rows(padded[start : start + rows])))
        for start in range(0, len(padded), rows)
    ]
    return np.concatenate(scored)[:n, : length - 1]


@programs.shared
def compiled_logprobs(config: ModelConfig) -> Any:
    def scored(params: Any, tokens: Any) -> Any:
        return sharding.constrain(token_logprobs(params, config, tokens), (None, None))

    return jax.jit(scored)


def processbench_splits(config: Config) -> Splits:
    """The samples of each split, as many as asked for; and why others are missing.

    Raises FileNotFoundError as `evaluation.processbench.find`.
    """
    wanted = config.evaluate.processbench
    files, missing = processbench.find(wanted.folder or _published(), wanted.splits)
    samples = {split: processbench.load(file) for split, file in files.items()}
    return {
        split: processbench.subset(all_of_it, wanted.num_samples, config.seed)
        for split, all_of_it in samples.items()
    }, missing


def benchmark_problems(config: Config) -> Benchmarks:
    """Task and problems of each benchmark; and why others are missing.

    Of those that `evaluate.benchmarks.names` names none may be missing. Without names it is the
    six of the paper, of which at least one must be there. Raises FileNotFoundError otherwise.
    """
    wanted = config.evaluate.benchmarks
    present, missing = {}, {}
    for name in wanted.names or benchmarks.BENCHMARKS:
        try:
            present[name] = _benchmark(config, name)
        except FileNotFoundError as error:  # no file; or no network, no such data set on the hub
            missing[name] = " ".join(str(error).split())
    if missing and (wanted.names or not present):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise FileNotFoundError(f"evaluate.benchmarks: {reasons}")
    return present, missing


DATA: dict[str, Callable[[Config], Any]] = {
    "processbench": processbench_splits,
    "benchmarks": benchmark_problems,
}
TABLES: dict[str, Callable[[Mapping[str, Any]], tables.Table]] = {
    "processbench": tables.processbench_table,
    "benchmarks": tables.policy_table,
}


def policy_settings(config: Config) -> SamplingSettings:
    return dataclasses.replace(
        loading.sampling(config, config.evaluate), greedy=config.evaluate.greedy
    )


def samples_per_problem(config: Config, number: int) -> int:
    """One greedy response is like another."""
    return 1 if config.evaluate.greedy else number


def is_right(task: tasks.Task, problem: Problem, text: str) -> bool | None:
    """A right answer in a response that keeps the format: what RL is meant to bring about.

    None for a problem without a reference.
    """
    if problem.answer is None:
        return None
    return task.text_format.same_answer(answer(task, text), problem.answer)


def answer(task: tasks.Task, text: str) -> str | None:
    """The answer in the valid part; None where the response breaks the format."""
    return benchmarks.read_answer(task.text_format, text, "format")


def as_solution(task: tasks.Task, problem: Problem, sample: SampledText) -> Solution:
    """The valid part of a response: all that a reward model sees, and so all that is labelled."""
    text = response_format.valid_part(sample.text)
    return Solution(
        problem_id=problem.id,
        index=0,
        text=text,
        steps=step_texts(text, task.text_format.split_steps(text)),
        answer=task.text_format.final_answer(text),
        finished=sample.finished,
    )


def _benchmark(config: Config, name: str) -> tuple[tasks.Task, list[Problem]]:
    """At most as many problems as asked for. FileNotFoundError where there are none."""
    wanted = config.evaluate.benchmarks
    data = None if wanted.folder is None else Path(wanted.folder) / name
    if data is not None and not data.is_dir():  # and may look like a hub id
        raise FileNotFoundError(f"no folder {data}")
    shared = {field: config.task_options[field] for field in SHARED_OPTIONS}
    task = tasks.load(name, tasks.TaskOptions(data=None if data is None else str(data), **shared))
    found = task.data_counts("eval").get(
        "problems"
    )  # a task that makes its problems has any number
    number = wanted.num_problems
    if found is not None and number is not None:
        number = min(found, number)
    return task, task.problems(number, config.seed, "eval")


SHARED_OPTIONS = ("prompt_dir", "split_steps", "on_bad_row")  # the others are of config.task


def _published() -> Path:
    if "SPARK_JAX_DATA" not in os.environ:
        raise ConfigError(
            "evaluate.processbench.folder is not set, nor is $SPARK_JAX_DATA, the folder of "
            "processbench/<split>.json; set either"
        )
    return Path(os.environ["SPARK_JAX_DATA"]) / "processbench"


def _shifted(on_progress: OnProgress, before: int, total: int) -> OnProgress:
    return lambda done, _: on_progress(before + done, total)


def main(config: Config, path: Path) -> None:
    """`run`, with what it found on the screen."""
    console = Console()
    with progress.shown(str(path), "problems") as on_progress:
        summary = run(config, path, on_progress)
    if not processes.is_main():
        return
    if config.evaluate.what in TABLES:
        tables.show(TABLES[config.evaluate.what](summary), console)
        console.print(f"summary: {path / 'summary.json'}")
    else:
        print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    launch.main(main, checks.check_evaluate)
