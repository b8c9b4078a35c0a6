"""Made-up rollouts of any size, with everything that the page shows."""

import numpy as np

from spark_jax.reports.rollouts import Group, Judged, Response, RolloutRecord

VALUES = ("logprob", "ref_logprob", "cpr", "grpo", "selective", "global_step", "masked_step")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1><!--"


def record(groups=3, size=4, tokens=12, seed=0, verifications=3, text=lambda b, t: f" t{t}"):
    """P groups of G responses of about so many tokens in four steps; a third of the responses is
    wrong, some are judged wrongly, some carry flags."""
    rng = np.random.default_rng(seed)
    made, values = [], {name: [] for name in VALUES}
    for p in range(groups):
        rows = []
        for g in range(size):
            b = p * size + g
            length = int(tokens + rng.integers(0, 4))
            rows.append(_response(b, length, rng, verifications, text))
            for name in VALUES:
                row = rng.standard_normal(length)
                values[name].append(np.full(length, row[0]) if name == "grpo" else row)
        made.append(Group(f"problem-{p}", f"What is {p} + 1?\nSay it.", str(p + 1), tuple(rows)))
    flat = {name: np.concatenate(rows).astype(np.float32) for name, rows in values.items()}
    return RolloutRecord(7, "masked_step", groups, tuple(made), flat)


def _response(b, length, rng, verifications, text):
    correct, overall = bool(b % 3), bool((b + b // 4) % 2)
    steps = np.minimum(np.arange(length) * 6 // length - 1, 4)
    truth = (True, True, correct, correct)
    verdicts = (1, 1, 1 if overall or b % 6 == 2 else -1, 0 if b % 5 == 0 else 1)
    said = [
        Judged(
            f"said {i} of {b}", bool((b + i) % 2), tuple(v > 0 for v in verdicts), None, 0.25 * i
        )
        for i in range(verifications)
    ]
    if verifications > 2:
        said[2] = Judged("no sense", None, (), "malformed_step")
    flags = tuple(np.array(["step_inflation", "verdict_gaming"])[rng.random(2) < 0.3].tolist())
    return Response(
        tokens=tuple(text(b, t) for t in range(length)),
        steps=tuple(int(step) if step < 4 else -1 for step in steps),
        finished=b % 4 != 3,
        overall=overall,
        verdicts=verdicts,
        verifications=tuple(said),
        chosen={"single": 0, "step_consistency": 1} if verifications > 1 else {},
        reward=float(overall),
        checks={"one_boxed": True, "nothing_after_answer": b % 6 != 0},
        flags=flags,
        correct=correct,
        step_labels=truth,
    )
