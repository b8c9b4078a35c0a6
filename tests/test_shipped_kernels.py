"""How the benchmark of shipped kernels counts."""

import itertools

import pytest

from benchmarks import shipped_kernels


@pytest.mark.parametrize(("width", "extra"), [(576, 1), (2048, 2)])
def test_branches_of_a_grid_are_counted_as_often_as_they_run(width, extra):
    """Against a walk over tokamax's grid, whose steps are what its kernels' `pl.when` ask for."""
    tokens, words, widths = 4, 5, -(-width // 512)
    steps = list(itertools.product(range(tokens), range(words), range(widths)))
    runs = [
        sum(h == 0 for _, _, h in steps),
        sum(h != 0 for _, _, h in steps),
        sum(h == widths - 1 for _, _, h in steps),
    ]
    count, shares = shipped_kernels._grid(len(steps) + extra, width, backward=False)
    assert count == len(steps)
    assert [count * share for share in shares] == pytest.approx(runs)
    runs[2] = sum(h == 0 for _, _, h in steps)
    runs += [
        sum(b == 0 for b, _, _ in steps),
        sum(v == 0 for _, v, _ in steps),
        sum(b != 0 for b, _, _ in steps),
        sum(v != 0 for _, v, _ in steps),
    ]
    count, shares = shipped_kernels._grid(2 * len(steps) + extra, width, backward=True)
    assert count == 2 * len(steps)
    assert [count * share for share in shares] == pytest.approx(runs)


def test_large_branches_count_by_their_share_and_all_else_in_every_step(tmp_path):
    """A forward kernel of 1 bundle before its loop, and 2 + 3 branches in it."""
    sizes = {1: 1200, 2: 1500, 3: 2000}
    lines = ["  0x0   :  { nothing }", "  0x1 LB: > { nothing }"]
    for region, size in sizes.items():
        lines.append(f"  0x2   : > {{ %1 = sbr.rel (%p1) target = $region{region} }}")
        lines += ["  0x3   : > { nothing }"] * (size - 1)
        lines.append(f"  0x4 PF: > {{ nothing }} /* Start/End empty region {region} */")
    lines.append("  0x5   : > { %p9 = scmp.ge.s32.totalorder %s1_s2, 42 /* loop exit test */ }")
    file = tmp_path / "1-cross_entropy_fwd_kernel-final_bundles.txt"
    file.write_text("\n".join(lines))
    steps, always = 4 * 5 * 2, 1 + 3 + 1  # the bundle that ends a region lies behind it
    expected = steps * (always + sum(sizes.values()) / 2)
    assert shipped_kernels._cycles_as_run(file, width=576) == expected


def test_paged_attention_reads_every_slots_keys_and_values():
    cases = shipped_kernels._attentions()
    for lanes, width, prompt, own in shipped_kernels.SLOTS:
        expected = lanes * width * (prompt + own) * 2 * 4 * 128 * 2
        for kernel in ("paged", "ragged_paged"):
            case = cases[f"decode_attention/{kernel}/{lanes}x{width}/{prompt}+{own}"]
            assert shipped_kernels._bytes_read(case) == expected
