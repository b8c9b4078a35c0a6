"""The kernels under the TPU compilers, where libtpu is installed, and how programs are read."""

import importlib.util
import sys

import pytest
from for_tpu import needs_libtpu

from spark_jax.kernels import ahead_of_time

HLO = """\
HloModule jit_f

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %inner = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, \
backend_config={"estimated_cycles":"20"}
}

%condition.1 (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main.1 (a: bf16[16,128]) -> f32[8,128] {
  %a = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %first = (f32[4]{0}, bf16[2,2]{1,0}) fusion(%a), kind=kLoop, \
backend_config={"estimated_cycles":"7"}
  %loop = (s32[], f32[8,128]{1,0:T(8,128)}) while(%first), condition=%condition.1, body=%body.1
  %kernel = f32[2]{0} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"cost_estimate":{"flops":"9","bytes_accessed":"12345"}}
}
"""


def test_operations_of_a_program():
    """Loops count their trips, VMEM is not HBM, a kernel says itself what it reads."""
    assert ahead_of_time.scheduled_operations(HLO) == [
        ahead_of_time.Operation("first", 1, 16 * 128 * 2 + 4 * 4 + 4 * 2, 7),
        ahead_of_time.Operation("inner", 5, 8 * 128 * 4, 20),
        ahead_of_time.Operation("kernel", 1, 12345, 0),
    ]


def test_bundles_of_an_operation(tmp_path):
    """One bundle before the loop, two in it, the inner one of them in a loop of three."""
    (tmp_path / "12-fusion.3-72-final_bundles.txt").write_text(
        "     0   :  { %11 = vsyncpa [#allocation7], 0 }\n"
        "   0x1 LB: > { %s1 = smov 0 }\n"
        "   0x2 LB: >> { %p1 = scmp.ge.s32.totalorder %s3_s4, 3 /* loop exit test */ }\n"
        "   0x3   : > { %p2 = scmp.ge.s32.totalorder %s1_s2, 10 /* loop exit test */ }\n"
    )
    assert ahead_of_time.bundle_count(tmp_path, "fusion.3") == 1 + 2 * 10 + 1 * 30
    assert ahead_of_time.bundle_count(tmp_path, "fusion") == 0


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"'v3'.*v5e"):
        ahead_of_time.report(["v3"])
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    with pytest.raises(RuntimeError, match=r"libtpu is not installed.*make pods"):
        ahead_of_time.report()


@pytest.mark.slow(minutes=3)
@needs_libtpu
def test_kernels_compile_for_all_generations_and_hold_no_scores():
    """Temporaries are a share of the reference's, as one generation has it, wherever the reference
    leaves VMEM."""
    references = {row["case"]: row["temporaries"] for row in ahead_of_time.report(["v5e"], "/xla/")}
    rows = ahead_of_time.report(["v5e", "v5p", "v6e"], "/pallas_tpu/")
    assert len(rows) == 3 * len(references) == 3 * len(ahead_of_time.all_cases()) // 2
    for row in rows:
        size, reference = row["temporaries"], references[row["case"].replace("pallas_tpu", "xla")]
        assert size < 24 * 2**20, (row["generation"], row["case"])
        assert reference < 100 * 2**20 or size < reference / 5, (row["generation"], row["case"])
