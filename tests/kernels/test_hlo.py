"""How compiled programs are read: a program with every kind of loop and collective, counted by
hand."""

from spark_jax.kernels import hlo

HLO = """\
HloModule jit_f

%scattered (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}
  ROOT %slice = f32[16]{0} dynamic-slice(%sum), dynamic_slice_sizes={16}
}

%all-reduce-scatter (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %sum.2 = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}
  ROOT %slice = f32[16]{0} dynamic-slice(%sum.2), dynamic_slice_sizes={16}
}

%layer (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0:T(8,128)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %gathered = bf16[32,128]{1,0:T(8,128)S(1)} all-gather(%x), dimensions={0}, \
metadata={op_name="jit(f)/while/body/gather"}
  %sent = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1}}
  %received = bf16[8,128]{1,0} collective-permute-done(%sent)
  %kernel = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"cost_estimate":{"flops":"1000"}}
  %work = bf16[8,128]{1,0} fusion(%gathered), kind=kLoop, calls=%scattered, \
backend_config={"estimated_cycles":"20"}
}

%fewer_than_28 (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[], bf16[8,128]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(28)
  %counter = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%counter, %bound), direction=LT
}

%token (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %layers = (s32[], bf16[8,128]{1,0}) while(%p), condition=%fewer_than_28, body=%layer
  %sampled = s32[8]{0} fusion(%layers), kind=kLoop, backend_config={"estimated_cycles":"7"}
}

%not_done (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %most = s32[] constant(2048)
  %count = s32[] get-tuple-element(%p), index=0
  %room = pred[] compare(%count, %most), direction=LT
  ROOT %both = pred[] and(%room, %room)
}

%small_ring (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %quick = s32[8]{0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"3"}
}

%large_ring (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %tokens = (s32[], bf16[8,128]{1,0}) while(%p), condition=%not_done, body=%token, \
metadata={op_name="jit(f)/branch_1_fun/while"}
}

ENTRY %main (a: (s32[], bf16[8,128])) -> f32[16] {
  %a = (s32[], bf16[8,128]{1,0}) parameter(0)
  %which = s32[] constant(1)
  %chosen = (s32[], bf16[8,128]{1,0}) conditional(%which, %a, %a), \
branch_computations={%small_ring, %large_ring}
  %g = f32[64]{0} get-tuple-element(%chosen), index=1
  %s = f32[16]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_cycles_count_known_trips_and_the_costliest_branch():
    found = hlo.instructions(HLO)
    assert hlo.estimated_cycles(found) == 28 * 20 + 7
    assert hlo.kernel_flops(found) == (28 * 1000, 0)
    by_name = {i.name: i for i in found}
    assert by_name["work"].trips == 28
    assert by_name["sampled"].trips == 1  # nobody knows how many tokens there will be
    assert by_name["sampled"].loops == ("jit(f)/branch_1_fun/while",)
    assert by_name["s"].loops == ()
    assert "quick" not in by_name


def test_collectives_by_kind_trips_and_bytes():
    found = {c.name: c for c in hlo.collectives(hlo.instructions(HLO))}
    kinds = {name: (c.kind, c.trips, c.bytes) for name, c in found.items()}
    assert kinds == {
        "gathered": ("all-gather", 28, 32 * 128 * 2),
        "sent": ("collective-permute", 28, 8 * 128 * 2 + 8),
        "sum": ("all-reduce", 28, 64 * 4),
        "sum.2": ("reduce-scatter", 1, 64 * 4),
    }
    assert found["gathered"].op_name == "jit(f)/while/body/gather"


def test_an_asynchronous_collective_in_several_fusions_counts_once():
    part = """\

%part_1 (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %whole.1 = bf16[32,128]{1,0} all-gather(%x), frontend_attributes={chain_id="7"}
}
"""
    text = (
        part
        + part.replace("1", "2", 1).replace("whole.1", "whole.2")
        + """
ENTRY %main (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %a = bf16[32,128]{1,0} fusion(%x), kind=kCustom, calls=%part_1
  %b = bf16[32,128]{1,0} fusion(%x), kind=kCustom, calls=%part_2
  %c = bf16[32,128]{1,0} all-gather(%x), frontend_attributes={chain_id="7"}
}
"""
    )
    assert [c.name for c in hlo.collectives(hlo.instructions(text))] == ["whole.1", "c"]


def test_a_kernel_that_says_nothing_is_counted():
    silent = HLO.replace('"cost_estimate":{"flops":"1000"}', "")
    assert hlo.kernel_flops(hlo.instructions(silent)) == (0, 1)


def test_sizes_of_arrays():
    assert hlo.shape_bytes("(s32[], bf16[8,128]{1,0:T(8,128)}, pred[3]{0})") == 4 + 2048 + 3
    vmem = "(f32[2,2]{1,0:T(8,128)S(1)}, f32[3]{0})"
    assert hlo.shape_bytes(vmem) == 28
    assert hlo.shape_bytes(vmem, hbm_only=True) == 12
    assert hlo.largest_arrays(HLO, 2) == [(32 * 128, "bf16[32,128]"), (8 * 128, "bf16[8,128]")]
