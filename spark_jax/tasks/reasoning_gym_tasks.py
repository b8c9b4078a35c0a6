"""Tasks of reasoning-gym (arXiv 2505.24760): problems made on demand, graded by the dataset itself.

Many datasets accept more than one answer and need the whole entry to score one. So a problem's
reference answer is a JSON text that names the entry, from which the entry is made again to grade;
nothing of it stands in the metadata, which reference-free stages keep. Where a reference is shown,
in `reference_guided` verification, it is the entry's own answer.

reasoning-gym runs in a worker process: see `reasoning_gym_worker`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any

from spark_jax.data.formats import TextFormat
from spark_jax.data.problems import question_key
from spark_jax.data.records import Problem
from spark_jax.evaluation.worker_process import WorkerProcess, stop_all
from spark_jax.tasks.problem_sets import SPLITS, Split

logger = logging.getLogger(__name__)

BLOCK = 50  # entries made together
EVAL_SHARE = 0.2  # of the questions
BARREN_BLOCKS = 20  # this many blocks without a new problem: there are no more
MAX_CHARACTERS = 4000  # the longest answer that is scored
LIMITS = {"make": 300.0, "score": 5.0, "memory": 4 * 2**30}  # processor seconds; bytes
CLOCK_FACTOR = 10  # the clock's limit, in limits of processor time


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset of reasoning-gym with its settings, in a worker process of its own.

    Raises ValueError for settings that are no JSON scalars, and where reasoning-gym is missing.
    """

    name: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(
                f"task reasoning_gym:{self.name} needs the package reasoning-gym: "
                "pip install 'spark-jax[tasks]'"
            )
        for key, value in self.settings.items():
            if key in ("seed", "size") or not isinstance(value, str | int | float | bool | None):
                raise ValueError(
                    f"task reasoning_gym:{self.name}: generator.{key}={value!r}; settings are "
                    "single values, and seed and size are not among them"
                )

    def make(self, seed: int) -> list[tuple[str, str | None]]:
        """Question and answer of the `BLOCK` entries of a seed. ValueError names what is wrong."""
        made = self._ask("make", seed, BLOCK)
        if "value" not in made:
            raise ValueError(
                f"task reasoning_gym:{self.name} with {self.settings}: "
                f"{made.get('error', 'making problems took too long or too much memory')}"
            )
        return [(q, a if a is None else str(a)) for q, a in made["value"]]

    def is_right(self, seed: int, index: int, answer: str) -> bool:
        """Whether the dataset gives the answer its full score. Whatever breaks, it is wrong."""
        if len(answer) > MAX_CHARACTERS:
            return False
        scored = self._ask("score", seed, BLOCK, index, answer)
        if "value" not in scored:
            logger.warning(
                "reasoning_gym:%s: scoring %.60r: %s; it counts as wrong",
                self.name, answer, scored.get("error", "over the limit of time or memory"),
            )  # fmt: skip
        return scored.get("value", 0.0) >= 1.0

    def _ask(self, kind: str, *arguments: Any) -> dict[str, Any]:
        request = [kind, self.name, self.settings, *arguments]
        return _worker(os.getpid()).ask(request, CLOCK_FACTOR * LIMITS[kind])


def problems(source: Source, num: int | None, seed: int, split: Split) -> list[Problem]:
    """`num` problems with different questions. A larger `num` extends the list.

    Which split a question belongs to is a hash of it, so the splits share none whatever the seeds;
    and no entry of one is a seed of the other.

    Raises:
        ValueError: `num` is None (there is no "all"), the split is unknown, the dataset is unknown
            or refuses its settings, or it has no more different questions.
    """
    if num is None or num < 0 or split not in SPLITS:
        raise ValueError(
            f"reasoning_gym:{source.name}: num={num}, split={split!r}; the problems are made on "
            "demand, so say how many, of train or eval"
        )
    chosen: dict[str, Problem] = {}
    block = barren = 0
    while len(chosen) < num:
        before = len(chosen)
        block_seed = _block_seed(seed, split, block)
        for index, (question, answer) in enumerate(source.make(block_seed)):
            key = question_key(question)
            if key and key not in chosen and split_of(key) == split and len(chosen) < num:
                reference = _reference(source, block_seed, index, answer)
                name = f"reasoning_gym:{source.name}/{block_seed}/{index}"
                chosen[key] = Problem(name, question, reference)
        block += 1
        barren = 0 if len(chosen) > before else barren + 1
        if barren == BARREN_BLOCKS:
            raise ValueError(
                f"reasoning_gym:{source.name} with {source.settings}: num={num} {split} problems "
                f"asked for, but {block * BLOCK} entries hold only {len(chosen)} different ones"
            )
    return list(chosen.values())


def split_of(key: str) -> Split:
    """Where a question belongs."""
    digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "big") < EVAL_SHARE * 2**32 else "train"


def graded_by(source: Source, text_format: TextFormat) -> TextFormat:
    """The format, with answers compared by the dataset.

    `same_answer` of an answer and a reference is whether the answer gets the full score; of two
    plain answers, whether their texts are the same.
    """

    @functools.lru_cache(maxsize=1 << 16)
    def same_answer(a: str | None, b: str | None) -> bool:
        if a is None or b is None:
            return False
        for reference, answer in ((a, b), (b, a)):
            entry = _read_reference(source, reference)
            if entry is not None and _read_reference(source, answer) is None:
                return bool(answer.strip()) and source.is_right(*entry, answer.strip())
        return bool(a.strip()) and a.strip() == b.strip()

    def verify_prompt(problem: Problem, solution_text: str, reference: str | None) -> str:
        shown = reference
        if reference is not None and _read_reference(source, reference) is not None:
            shown = json.loads(reference)["answer"]
            if shown is None:
                raise ValueError(
                    f"reasoning_gym:{source.name} has no one right answer to show a verifier; use "
                    "another method than reference_guided"
                )
        return text_format.verify_prompt(problem, solution_text, shown)

    return dataclasses.replace(text_format, same_answer=same_answer, verify_prompt=verify_prompt)


def _block_seed(seed: int, split: Split, block: int) -> int:
    """Apart from one another by more than a block: reasoning-gym adds the index to the seed.

    Below 2^31, for NumPy's old generators; so seeds are taken modulo 512, and a split of a seed has
    2^21 entries.
    """
    return ((2 * (seed % 512) + SPLITS.index(split)) << 21) + block * BLOCK


def _reference(source: Source, seed: int, index: int, answer: str | None) -> str:
    entry = {"reasoning_gym": source.name, "seed": seed, "index": index, "answer": answer}
    return json.dumps(entry)


def _read_reference(source: Source, text: str) -> tuple[int, int] | None:
    """Seed and index of a reference; None for any other text, as a model may write it."""
    if not text.startswith('{"reasoning_gym": ') or len(text) > 10 * MAX_CHARACTERS:
        return None
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    seed, index = entry.get("seed"), entry.get("index")
    if type(seed) is not int or type(index) is not int or not 0 <= index < BLOCK:
        return None
    own = 0 <= seed < 2**31 and _reference(source, seed, index, entry.get("answer")) == text
    return (seed, index) if own else None


class _Worker:
    """The worker process, started when first needed and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: list[WorkerProcess] = []  # at most one
        weakref.finalize(self, stop_all, self._process)

    def ask(self, request: list[Any], seconds: float) -> dict[str, Any]:
        """The worker's reply, or `WorkerProcess.receive`'s failure, after which it is stopped."""
        with self._lock:
            if self._process and not self._process[0].alive():
                logger.warning("reasoning_gym: the idle worker was killed; another takes its place")
                stop_all(self._process)
            if not self._process:
                file = Path(__file__).with_name("reasoning_gym_worker.py")
                self._process.append(WorkerProcess(file, json.dumps(LIMITS)))
            try:
                reply = self._process[0].ask(request, seconds)
            except BaseException:  # an interrupt: the reply must not be taken for the next one's
                stop_all(self._process)
                raise
            if "failure" in reply:
                stop_all(self._process)
            return reply


@functools.cache
def _worker(process_id: int) -> _Worker:
    """This process's worker: a fork does not use its parent's."""
    return _Worker()
