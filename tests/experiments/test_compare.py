import json

import numpy as np
import pytest

from spark_jax.experiments import compare


def run_folder(path, shares, key="evaluation", ids=None):
    path.mkdir(parents=True)
    ids = ids or [f"p{i}" for i in range(len(shares))]
    score = {"problem_ids": ids, "correct_per_problem": list(shares)}
    summary = {"benchmarks": {key: score}} if key != "evaluation" else {key: score}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_a_run_that_is_right_where_the_other_is_wrong_is_better(tmp_path):
    """Ten problems, eight won and none lost: the sign test's p is 2 / 2^8."""
    better = run_folder(tmp_path / "a", [1.0] * 10)
    worse = run_folder(tmp_path / "b", [0.0] * 8 + [1.0] * 2)
    found = compare.compare([better], [worse])["evaluation"]
    assert found["difference"]["estimate"] == pytest.approx(0.8)
    assert found["p_value"] == pytest.approx(2 / 2**8)
    assert compare.compare([better], [better])["evaluation"]["p_value"] == 1


def test_problems_are_paired_by_their_ids(tmp_path):
    shares, order = np.linspace(0, 1, 8), np.random.default_rng(0).permutation(8)
    one = run_folder(tmp_path / "a", shares)
    two = run_folder(tmp_path / "b", shares[order], ids=[f"p{i}" for i in order])
    found = compare.compare([one], [two])["evaluation"]
    assert found["difference"] == {"estimate": 0, "low": 0, "high": 0}


def test_several_seeds_widen_the_interval(tmp_path):
    rng = np.random.default_rng(1)
    folders = {
        (side, seed): run_folder(
            tmp_path / f"{side}{seed}", (rng.random(50) < 0.4 + 0.2 * side).astype(float).tolist()
        )
        for side in (0, 1)
        for seed in range(3)
    }
    first, second = ([folders[side, seed] for seed in range(3)] for side in (1, 0))
    found = compare.compare(first, second)["evaluation"]
    assert found["difference"]["low"] < 0.2 < found["difference"]["high"]
    assert len(found["first"]) == 3
    assert "p_value" not in found


def test_seeds_with_problems_of_their_own_are_paired_in_their_order(tmp_path):
    """As `train_rl` leaves them; the order of a run's problems does not matter."""
    ids = [[f"s{seed}-{i}" for i in range(10)] for seed in range(3)]
    won = [1, 2, 3]
    better = [
        run_folder(tmp_path / f"a{s}", [1.0] * n + [0.0] * (10 - n), ids=ids[s])
        for s, n in enumerate(won)
    ]
    worse = [run_folder(tmp_path / f"b{s}", [0.0] * 10, ids=ids[s][::-1]) for s in range(3)]
    found = compare.compare(better, worse)["evaluation"]
    assert found["first"] == pytest.approx([0.1, 0.2, 0.3])
    assert found["difference"]["estimate"] == pytest.approx(0.2)
    half = 4.302653 * 0.1 / 3**0.5  # t of two degrees of freedom
    assert found["difference"]["high"] == pytest.approx(0.2 + half, rel=1e-5)
    assert found["p_value"] == pytest.approx(2 / 2**6)
    with pytest.raises(ValueError, match="in the order of their seeds"):
        compare.compare(better, worse[::-1])


def test_what_only_some_have_is_named(tmp_path):
    one = run_folder(tmp_path / "a", [1.0, 0.0], key="math500")
    both = run_folder(tmp_path / "b", [1.0, 0.0], key="math500")
    summary = json.loads((both / "summary.json").read_text())
    summary["benchmarks"]["aime24"] = summary["benchmarks"]["math500"]
    (both / "summary.json").write_text(json.dumps(summary))
    assert compare.compare([one], [both])["left_out"] == ["aime24"]
    assert "left_out" not in compare.compare([both], [both])


def test_problems_without_a_reference_are_left_out_and_benchmarks_kept_apart(tmp_path):
    one = run_folder(tmp_path / "a", [1.0, None, 0.5], key="math500")
    found = compare.compare([one], [one])
    assert found["math500"]["num_problems"] == 2


def test_what_cannot_be_compared_is_refused(tmp_path):
    one = run_folder(tmp_path / "a", [1.0, 0.0])
    other = run_folder(tmp_path / "b", [1.0, 0.0], ids=["p0", "q"])
    with pytest.raises(ValueError, match="evaluated on different problems"):
        compare.compare([one], [other])
    with pytest.raises(ValueError, match="no benchmark in common"):
        compare.compare([one], [run_folder(tmp_path / "c", [1.0, 0.0], key="aime24")])
    with pytest.raises(ValueError, match="2 runs against 1"):
        compare.compare([one, one], [one])
    with pytest.raises(FileNotFoundError, match="no finished run"):
        compare.compare([tmp_path / "none"], [one])
    blind = run_folder(tmp_path / "d", [None, None])
    with pytest.raises(ValueError, match="no accuracy per problem"):
        compare.compare([blind], [one])
