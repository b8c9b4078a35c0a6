"""The problem sets with a name: where each is found, and what its fields mean.

One row of `PROBLEM_SETS` is one problem set. Local files come first: `$SPARK_JAX_DATA/<name>/` with
`train.jsonl`, `test.jsonl` (or .json, .parquet), else the hub.

Hub ids, splits and fields were taken from public code and dataset cards that load them, not from
the hub itself; the readers were run on the published files of gsm8k, math500, aime24 and amc23
only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from spark_jax.data import problems
from spark_jax.data.problems import Content, Loaded, Source
from spark_jax.data.records import Problem
from spark_jax.response_format import final_answer

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
DATA_VARIABLE = "SPARK_JAX_DATA"


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which problems a task is made of. None is the problem set's own choice.

    Attributes:
        data: a file (.jsonl, .json, .parquet), a folder or a hub id. A file holds the train split,
            or all there is where the problem set has no train split.
        eval_data: the same for the held-out problems, where they are not in `data`.
        eval_fraction: hold out this share of problems that come in one piece. Chosen by a hash of
            the question, so it is the same in every run, whatever the seed.
        on_bad_row: "report" (log, count, skip) or "error".
        references: False: read no answers, so that nothing is known and nothing is graded.
        question_field, answer_field: names of the fields.
        answer_form: how the answer stands in its field, a name in `ANSWER_FORMS`.
        config: which configuration of a dataset.
        train_split, eval_split: what a folder or hub id calls them.
    """

    data: str | None = None
    eval_data: str | None = None
    eval_fraction: float | None = None
    on_bad_row: str = "report"
    references: bool = True
    question_field: str | None = None
    answer_field: str | None = None
    answer_form: str | None = None
    config: str | None = None
    train_split: str | None = None
    eval_split: str | None = None


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """One row of the table.

    Attributes:
        hub: hub id; None where the problems are always the user's.
        config: its configuration.
        hub_splits: what the hub calls the splits that exist.
        questions: fields that may hold the question; the first that is there is read.
        answers: (field, answer form) likewise; () for problems without a right answer.
        metadata: fields kept in `Problem.metadata`, where they are there. Never an answer.
        rubrics: whether each problem has a rubric, kept in `Problem.metadata["rubric"]`.
        example: file of this package to begin with, where nothing else is named.
        eval_fraction: the default of `DataOptions.eval_fraction`.
    """

    hub: str | None = None
    config: str | None = None
    hub_splits: Mapping[Split, str] = dataclasses.field(default_factory=lambda: {"eval": "test"})
    questions: tuple[str, ...] = ("problem", "question")
    answers: tuple[tuple[str, str], ...] = (("answer", "plain"),)
    metadata: tuple[str, ...] = ()
    rubrics: bool = False
    example: str | None = None
    eval_fraction: float | None = None


_TRAIN_AND_TEST: dict[Split, str] = {"train": "train", "eval": "test"}

PROBLEM_SETS: dict[str, ProblemSet] = {
    "gsm8k": ProblemSet(
        hub="openai/gsm8k",
        config="main",
        hub_splits=_TRAIN_AND_TEST,
        questions=("question",),
        answers=(("answer", "after_hashes"),),
    ),
    "math": ProblemSet(
        hub="DigitalLearningGmbH/MATH-lighteval",
        hub_splits=_TRAIN_AND_TEST,
        questions=("problem",),
        answers=(("solution", "boxed"),),
        metadata=("level", "type", "subject"),
    ),
    "math500": ProblemSet(
        hub="HuggingFaceH4/MATH-500",
        questions=("problem",),
        metadata=("level", "subject"),
    ),
    "aime24": ProblemSet(hub="HuggingFaceH4/aime_2024", hub_splits={"eval": "train"}),
    "aime25": ProblemSet(hub="math-ai/aime25"),
    "amc23": ProblemSet(hub="math-ai/amc23"),
    # 674 text-only English problems; `final_answer` is a list.
    "olympiadbench": ProblemSet(
        hub="math-ai/olympiadbench",
        answers=(("final_answer", "without_dollars"), ("answer", "without_dollars")),
        metadata=("subfield", "answer_type", "unit"),
    ),
    # On the hub with `answer`; elsewhere with the answer in the box of a `solution`.
    "minerva": ProblemSet(
        hub="math-ai/minervamath", answers=(("answer", "plain"), ("solution", "boxed"))
    ),
    "problems": ProblemSet(hub_splits=_TRAIN_AND_TEST),
    "rubric": ProblemSet(
        hub_splits=_TRAIN_AND_TEST,
        answers=(),
        rubrics=True,
        example="rubric_example.jsonl",
        eval_fraction=0.25,
    ),
}


def splits(name: str, options: DataOptions) -> Callable[[Split], Loaded]:
    """The splits of a problem set. They share no question: what is held out is not trained on.

    The function returned reads a split when first asked for it and keeps it. It raises what
    `problems.load` raises, and ValueError, with the choices, for a split that does not exist.

    Raises ValueError for options that do not fit the problem set or one another.
    """
    problem_set = PROBLEM_SETS[name]
    _check(name, problem_set, options)
    fraction = options.eval_fraction
    fraction = problem_set.eval_fraction if fraction is None else fraction

    @functools.cache
    def load(source: Source) -> Loaded:
        logger.info("task %s reads %s", name, source)
        read = functools.partial(_read, problem_set, options)
        return problems.load(source, read, name=name, on_bad_row=options.on_bad_row)

    @functools.cache
    def split(which: Split) -> Loaded:
        sources = {role: _source(name, problem_set, options, role) for role in SPLITS}
        train, held_out = sources["train"], sources["eval"]
        if train is not None and held_out is not None:
            if options.eval_fraction is not None:
                raise ValueError(
                    f"task {name}: eval_fraction={options.eval_fraction} holds out a part of the "
                    f"problems, but there is a held-out split already: {held_out}"
                )
            loaded = load(held_out)
            return loaded if which == "eval" else _without(load(train), loaded)
        whole = train or held_out
        if whole is None:
            raise FileNotFoundError(_nothing_found(name, options))
        if fraction is not None:
            return _part(load(whole), fraction, which, whole)
        if sources[which] is None:
            raise ValueError(_no_split(name, which, whole))
        return load(whole)

    return split


def after_hashes(text: str) -> str | None:
    """`#### 1,234` at the end of a solution: 1234. None where there is none."""
    _, hashes, answer = text.rpartition("####")
    return answer.strip().replace(",", "") or None if hashes else None


def last_box(text: str) -> str | None:
    """What the solution's last box holds. The MATH solutions also write `\\fbox{}`, `\\boxed 3`."""
    text = text.replace("\\fbox", "\\boxed")
    boxed = final_answer(text)
    if boxed is None and "\\boxed " in text:
        boxed = text.rpartition("\\boxed ")[2].partition("$")[0].strip().rstrip(".") or None
    return boxed


def without_dollars(text: str) -> str | None:
    """`$x=1$, $x=2$` without the dollars: several answers are then compared as one tuple."""
    return text.replace("\\$", "\0").replace("$", "").replace("\0", "\\$").strip() or None


ANSWER_FORMS: dict[str, Callable[[str], str | None]] = {
    "plain": lambda text: text,
    "boxed": last_box,
    "after_hashes": after_hashes,
    "without_dollars": without_dollars,
}


# --- rows ----------------------------------------------------------------------------------------

ID_FIELDS = ("id", "unique_id")


def _read(problem_set: ProblemSet, options: DataOptions, row: Mapping[str, Any]) -> Content:
    field = _first_field(row, _names(options.question_field, problem_set.questions))
    if not isinstance(row[field], str):
        raise ValueError(f"field {field!r} is no text but a {type(row[field]).__name__}")
    question = problems.as_text(row[field], field)
    metadata = {
        name: problems.as_text(row[name], name)
        for name in problem_set.metadata
        if row.get(name) not in (None, "", [])
    }
    if problem_set.rubrics:
        metadata["rubric"] = _rubric(row)
    own = next((row[name] for name in ID_FIELDS if row.get(name) is not None), None)
    own_id = None if own is None else problems.as_text(own, "id")
    return Content(question, _answer(problem_set, options, row), own_id, metadata)


def _answer(problem_set: ProblemSet, options: DataOptions, row: Mapping[str, Any]) -> str | None:
    if not problem_set.answers or not options.references:
        return None
    forms = dict(problem_set.answers)
    field = _first_field(row, _names(options.answer_field, tuple(forms)))
    form = options.answer_form or forms.get(field, "plain")
    answer = ANSWER_FORMS[form](problems.as_text(row[field], field))
    if answer is None:
        raise ValueError(f"field {field!r} holds no answer of the form {form!r}")
    return answer


def _rubric(row: Mapping[str, Any]) -> str:
    """A text, or a list of points, which are then numbered."""
    points = row[_first_field(row, ("rubric",))]
    if isinstance(points, list) and points:
        texts = [problems.as_text(point, "rubric") for point in points]
        return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
    return problems.as_text(points, "rubric")


def _names(given: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if given is None else (given,)


def _first_field(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    wanted = " or ".join(map(repr, names))
    raise ValueError(f"field {wanted} is missing; the row has {sorted(map(str, row))}")


# --- sources and splits --------------------------------------------------------------------------


def _source(name: str, problem_set: ProblemSet, options: DataOptions, role: Split) -> Source | None:
    """Where a split is; None where it does not exist."""
    if role == "eval" and options.eval_data is not None:
        return _within(problem_set, options, options.eval_data, role, holds=role)
    if options.data is not None:
        whole: Split = "train" if "train" in problem_set.hub_splits else "eval"
        return _within(problem_set, options, options.data, role, holds=whole)
    if problem_set.example is not None:
        file = Path(str(resources.files("spark_jax.tasks") / problem_set.example))
        return Source(str(file), file.stem) if role == "train" else None
    if role not in problem_set.hub_splits:
        return None
    folder = os.environ.get(DATA_VARIABLE)
    local = _local_file(Path(folder) / name, _TRAIN_AND_TEST[role]) if folder else None
    if local is not None or problem_set.hub is None:
        return local
    return Source(problem_set.hub, problem_set.hub_splits[role], problem_set.config)


def _within(
    problem_set: ProblemSet, options: DataOptions, data: str, role: Split, holds: Split
) -> Source | None:
    """The split of that role in the user's file, folder or hub id. A file has one: `holds`."""
    path = Path(data)
    if path.is_file():
        return Source(data, path.stem) if role == holds else None
    asked = options.train_split if role == "train" else options.eval_split
    own = problem_set.hub_splits.get(role)
    if path.is_dir():
        names = [asked] if asked else [_TRAIN_AND_TEST[role], own]
        found = [file for name in names if name and (file := _local_file(path, name))]
        if found and role == "train" and not asked:  # held-out problems that are called "train"
            held_out = _within(problem_set, options, data, "eval", holds)
            found = [file for file in found if file != held_out]
        if found or any(_local_file(path, name) for name in _TRAIN_AND_TEST.values()):
            return found[0] if found else None
    of_hub = data == problem_set.hub
    split = asked or (own if of_hub else own and _TRAIN_AND_TEST[role])
    config = options.config or (problem_set.config if of_hub else None)
    return Source(data, split, config) if split else None


def _local_file(folder: Path, split: str) -> Source | None:
    """`<folder>/<split>.jsonl`, .json or .parquet. ValueError if there are several."""
    files = [folder / f"{split}{suffix}" for suffix in problems.SUFFIXES]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder}: which is it, {' or '.join(f.name for f in found)}?")
    return Source(str(found[0]), split) if found else None


def _without(loaded: Loaded, held_out: Loaded) -> Loaded:
    """Without the problems that are held out too: counted as duplicates."""
    keys = {problems.question_key(problem.question) for problem in held_out.problems}
    kept = [p for p in loaded.problems if problems.question_key(p.question) not in keys]
    shared = len(loaded.problems) - len(kept)
    if shared:
        logger.warning("%d train problems are also held out, and are not trained on", shared)
    return dataclasses.replace(loaded, problems=tuple(kept), duplicates=loaded.duplicates + shared)


def _part(loaded: Loaded, fraction: float, which: Split, source: Source) -> Loaded:
    kept = tuple(p for p in loaded.problems if (_share(p) < fraction) == (which == "eval"))
    if not kept:
        raise ValueError(
            f"{source}: eval_fraction={fraction} of {len(loaded.problems)} problems leaves none "
            f"for {which!r}"
        )
    return dataclasses.replace(loaded, problems=kept)


def _share(problem: Problem) -> float:
    """A number in [0, 1) that depends on the question alone."""
    key = problems.question_key(problem.question).encode("utf-8")
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32


def _check(name: str, problem_set: ProblemSet, options: DataOptions) -> None:
    fraction = options.eval_fraction
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"task {name}: eval_fraction={fraction} must be between 0 and 1")
    if options.answer_form is not None and options.answer_form not in ANSWER_FORMS:
        raise ValueError(
            f"task {name}: answer_form={options.answer_form!r} is unknown; choose one of "
            f"{sorted(ANSWER_FORMS)}"
        )
    if options.on_bad_row not in problems.ON_BAD_ROW:
        raise ValueError(
            f"task {name}: on_bad_row={options.on_bad_row!r} is unknown; choose one of "
            f"{problems.ON_BAD_ROW}"
        )
    if problem_set.hub is None and problem_set.example is None and options.data is None:
        raise ValueError(
            f"task {name!r} is made of your own problems: name a file, folder or hub id in "
            "task_options.data"
        )


def _no_split(name: str, which: Split, whole: Source) -> str:
    other = "train" if which == "eval" else "eval"
    mend = (
        "task_options.eval_data, a file with held-out problems"
        if which == "eval"
        else "task_options.data with a train split (or another task to train on)"
    )
    return (
        f"task {name} has no {which!r} problems: {whole} is all there is, and is {other!r}. Give "
        f"{mend}, or task_options.eval_fraction=0.2 to hold out a fifth of it and train on the "
        "rest (scores are then not those of the whole set)"
    )


def _nothing_found(name: str, options: DataOptions) -> str:
    return f"task {name}: neither a train nor a test split was found in {options.data!r}"
