"""What stage I takes on a slice: tokens, hours and chip-hours, from its compiled programs.

The programs' static estimates know no stalls, and the lengths of texts are not known before they
are written: what is assumed is printed with the result, and every assumption is an option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from spark_jax.decoding.decoder import TOKENS
from spark_jax.experiments.configuration import Config, ConfigError
from spark_jax.experiments.tpu_chips import CHIPS, generation
from spark_jax.verification.aggregate import AGGREGATIONS

# name -> (default, meaning); NaN: half of decode.max_new_tokens
ASSUMPTIONS = {
    "mean_solution_tokens": (float("nan"), "tokens of a solution"),
    "mean_verification_tokens": (float("nan"), "tokens of a verification"),
    "occupancy": (0.85, "share of the decoder's slots that are at work"),
    "efficiency": (0.5, "share of the estimated speed that a device reaches"),
}


def seconds(cost: Mapping[str, Any], topology: str) -> dict[str, float]:
    """What a program, or a trip of one of its loops, takes of a device by static estimate: cycles
    at the clock and kernels' arithmetic at the peak ("computing"), collectives' bytes at the full
    speed of the links ("moving"). None of it overlaps."""
    chip = CHIPS[generation(topology)]
    # Round a ring, a sum goes twice: once to be made, once to be told.
    rounds = {"all-reduce": 2}
    moved = sum(rounds.get(kind, 1) * one["bytes"] for kind, one in cost["collectives"].items())
    return {
        "computing": cost["cycles"] / (chip.clock * 1e9)
        + cost["kernel_flops"] / (chip.flops * 1e12),
        "moving": moved / (chip.links * 1e9),
    }


def stage_one(
    config: Config, rows: Sequence[Mapping[str, Any]], assumed: Mapping[str, float]
) -> dict[str, Any]:
    """Tokens, hours and chip-hours of generating and verifying.

    Args:
      rows: of `compile_for_pod` for one mesh, those of generate/* and verify/* among them.
      assumed: of ASSUMPTIONS, those that are not to be the defaults.

    Returns:
      `generate`, `verify` and `together`, each with `prompts`, `tokens`, `hours`, `chip_hours`;
      `assumptions`: name -> value; `without_time`: program -> kernels without an estimate.

    Raises:
      ConfigError: no number of problems, or programs that did not compile or do not fit.
    """
    if config.generate.num_problems is None:
        raise ConfigError("generate.num_problems is None; set it to what the data set has")
    values = _assumptions(config, assumed)
    by_name = {row["program"]: row for row in rows}
    asked, written = _prompts_and_texts_per_solution(config)
    solutions = config.generate.num_problems * config.generate.samples_per_problem
    texts = {
        "generate": (config.generate.num_problems, solutions, values["mean_solution_tokens"]),
        "verify": (solutions * asked, solutions * written, values["mean_verification_tokens"]),
    }
    plan: dict[str, Any] = {
        stage: _decoding(stage, by_name, prompts, count, length, values)
        for stage, (prompts, count, length) in texts.items()
    }
    plan["together"] = {
        name: plan["generate"][name] + plan["verify"][name] for name in plan["generate"]
    }
    silent = {name: row.get("kernels_without_estimate", 0) for name, row in by_name.items()}
    without = {name: count for name, count in silent.items() if count and name in _PROGRAMS}
    return plan | {"assumptions": values, "without_time": without}


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """The plan as a table, and what it assumes."""
    table = Table(title="stage I, by static estimate")
    for name in ("", "prompts", "tokens", "hours", "chip-hours"):
        table.add_column(name, justify="right" if name else "left")
    for stage in ("generate", "verify", "together"):
        part = plan[stage]
        numbers = (f"{part['prompts']:,}", f"{part['tokens']:,}")
        table.add_row(stage, *numbers, f"{part['hours']:.2f}", f"{part['chip_hours']:.1f}")
    console.print(table)
    console.print("Assumed, not measured:")
    for name, value in plan["assumptions"].items():
        console.print(f"  --{name}={value:g}  {ASSUMPTIONS[name][1]}", highlight=False)
    for name, count in plan["without_time"].items():
        line = f"no time for {count} kernels (attention) of {name}, which state none"
        console.print(f"  {line}", highlight=False)
    for line in _ALSO_ASSUMED:
        console.print(f"  {line}", highlight=False)


_PROGRAMS = ("generate/prefill", "generate/decode", "verify/prefill", "verify/decode")
_ALSO_ASSUMED = (
    "every prompt as long as decode.max_prompt_length, and prefilled on its own",
    "the clock, peak and link speeds of experiments/tpu_chips.py",
    "collectives do not overlap with computing; the host and loading take no time",
    "the network between slices, which data spans, as fast as the links within one",
    "every token decoded against the largest cache, that of responses of decode.max_new_tokens",
    "every solution with steps and a reference, and every critique with a verification to judge",
    "top-p's search for its cut counts one of its passes",
)


def _prompts_and_texts_per_solution(config: Config) -> tuple[int, int]:
    """Of the verifier: N verifications to a prompt, with a reference or without; a critique and a
    merged verification, to a prompt each."""
    methods = [AGGREGATIONS[name] for name in config.verify.methods]
    kinds = len({method.reference for method in methods})
    critiques = sum(2 for method in methods if method.critique)
    return kinds + critiques, kinds * config.verify.samples_per_solution + critiques


def _decoding(
    stage: str,
    by_name: Mapping[str, Mapping[str, Any]],
    prompts: int,
    texts: int,
    length: float,
    values: Mapping[str, float],
) -> dict[str, float]:
    prefill, decode = (_compiled(by_name, f"{stage}/{name}") for name in ("prefill", "decode"))
    step = sum(seconds(decoder_step(decode), decode["topology"]).values())
    fill = sum(seconds(prefill, prefill["topology"]).values())
    tokens = int(texts * length)
    steps = tokens / (decode["rows"] * values["occupancy"])
    hours = (steps * step + prompts / prefill["rows"] * fill) / values["efficiency"] / 3600
    chips = decode["devices"] / CHIPS[generation(decode["topology"])].devices_per_chip
    return {"prompts": prompts, "tokens": tokens, "hours": hours, "chip_hours": hours * chips}


def decoder_step(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What one token for every slot costs, of a decoder's row: a trip of its loop over tokens."""
    return next(cost for name, cost in row["loops"].items() if name.endswith(f"{TOKENS}/while"))


def _compiled(by_name: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    row = by_name.get(name)
    if row is None:
        raise ConfigError(f"no plan without the program {name}, which was not compiled")
    if not row["fits"]:
        lacks = f": {row['over'] / 2**30:.2f} GiB a device are missing" if "over" in row else ""
        mesh = "·".join(map(str, row["mesh"].values()))
        raise ConfigError(
            f"no plan: the program {name} does not fit {row['topology']} over {mesh}{lacks}"
            f"{'; ' + row['error'] if 'error' in row else ''}; choose another mesh or topology"
        )
    return row


def _assumptions(config: Config, given: Mapping[str, float]) -> dict[str, float]:
    half = config.decode.max_new_tokens / 2
    values = {name: default for name, (default, _) in ASSUMPTIONS.items()} | dict(given)
    return {name: half if value != value else value for name, value in values.items()}
