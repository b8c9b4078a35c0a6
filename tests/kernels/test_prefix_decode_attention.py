"""Shared prompt and own tokens: a loop over slots, the TPU kernel under its interpreter, and that
for GPUs interpreted and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from for_cuda import text as text_for_cuda
from jax.experimental.pallas import tpu as pltpu

from spark_jax.kernels import prefix_decode_attention_gpu, prefix_decode_attention_tpu
from spark_jax.kernels.prefix_decode_attention import prefix_decode_attention

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
LAYER = 1


@pytest.fixture(autouse=True)
def no_races(capfd):
    """The interpreter prints what it finds and goes on."""
    yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out


def inputs(lanes=2, slots=3, heads=4, kv_heads=2, width=8, length=5, columns=7, dtype="float32"):
    """So many slots in each lane; of two layers one is meant, the other holds NaN."""
    rng = np.random.default_rng(length + columns)

    def normal(*shape):
        return rng.normal(size=shape).astype(jnp.dtype(dtype))

    def stacked(*shape):
        return np.stack([np.full(shape, np.nan, jnp.dtype(dtype)), normal(*shape)])

    every = lanes * slots
    return {
        "q": 2 * normal(every, heads, width),
        "prompt_keys": stacked(lanes, kv_heads, width, length),
        "prompt_values": stacked(lanes, kv_heads, length, width),
        "lengths": rng.integers(0, length + 1, lanes).astype(np.int32),
        "keys": stacked(every, kv_heads, width, columns),
        "values": stacked(every, kv_heads, columns, width),
        "own_mask": rng.random((every, columns)) < 0.5,
        "layer": np.int32(LAYER),
    }


def slot_by_slot(q, prompt_keys, prompt_values, lengths, keys, values, own_mask, layer):
    """Each head of each slot with its own copy of what it sees."""
    stacks = (prompt_keys, prompt_values, keys, values)
    prompt_keys, prompt_values, keys, values = (np.asarray(x[layer], np.float64) for x in stacks)
    q = np.asarray(q, np.float64)
    out, logsumexp = np.zeros(q.shape), np.full(q.shape[:-1], -1e29)
    for s, h in np.ndindex(*q.shape[:-1]):
        g, r = h // (q.shape[1] // keys.shape[1]), s // (len(q) // len(lengths))
        mine = np.asarray(own_mask[s])
        k = np.concatenate([prompt_keys[r, g, :, : lengths[r]], keys[s, g][:, mine]], axis=1)
        v = np.concatenate([prompt_values[r, g, : lengths[r]], values[s, g, mine]])
        if len(v):
            weights = np.exp(q[s, h] @ k / np.sqrt(q.shape[-1]))
            out[s, h] = weights @ v / weights.sum()
            logsumexp[s, h] = np.log(weights.sum())
    return out, logsumexp


def on_device(arguments):
    return {name: jnp.asarray(x) for name, x in arguments.items()}


def reference(**arguments):
    return jax.jit(prefix_decode_attention)(**on_device(arguments))


def kernel(**arguments):
    return prefix_decode_attention_tpu.prefix_decode_attention(
        *on_device(arguments).values(), interpret=INTERPRET
    )


def gpu_kernel(**arguments):
    return prefix_decode_attention_gpu.prefix_decode_attention(
        *on_device(arguments).values(), interpret=True
    )


def assert_equal(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got[0]), expected[0], atol=atol)
    np.testing.assert_allclose(np.asarray(got[1]), expected[1], rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_reference_slot_by_slot(heads, kv_heads):
    arguments = inputs(heads=heads, kv_heads=kv_heads)
    assert_equal(reference(**arguments), slot_by_slot(**arguments))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(prefix_decode_attention_tpu, "_block", lambda tokens, _: min(tokens, 4))
    monkeypatch.setattr(prefix_decode_attention_tpu, "_SLOTS", 2)
    prefix_decode_attention_tpu.prefix_decode_attention.clear_cache()
    yield
    prefix_decode_attention_tpu.prefix_decode_attention.clear_cache()


ONE = {"lanes": 1, "slots": 1, "heads": 1, "kv_heads": 1, "length": 1, "columns": 1}
THREE = {"lanes": 3, "slots": 2, "heads": 9, "kv_heads": 3, "length": 6, "columns": 3}


@pytest.mark.parametrize(
    ("attend", "shape"),
    [
        (gpu_kernel, {}),
        (gpu_kernel, THREE),
        (gpu_kernel, ONE),
        pytest.param(kernel, {}, marks=pytest.mark.slow),  # as with a slot that sees nothing
        pytest.param(kernel, THREE, marks=pytest.mark.slow),
        pytest.param(kernel, ONE, marks=pytest.mark.slow),
    ],
)
def test_kernel_equals_the_loop(attend, shape):
    arguments = inputs(**shape)
    assert_equal(attend(**arguments), slot_by_slot(**arguments))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("length", "columns"), [pytest.param(8, 8, marks=pytest.mark.slow), (9, 6)]
)
def test_kernel_in_blocks(length, columns):
    """Whole blocks and ragged ends, of prompt and own columns; two parts of each lane's slots;
    lanes without a prompt."""
    arguments = inputs(lanes=4, slots=4, length=length, columns=columns)
    arguments["lengths"] = np.array([4, length, 0, 1], np.int32)
    assert_equal(kernel(**arguments), slot_by_slot(**arguments))


@pytest.mark.parametrize("columns_seen", ["some", "few", "none"])
def test_gpu_kernel_in_blocks_and_shares(columns_seen):
    """Several blocks of queries and of columns, in shares; ragged ends; a width that is no power of
    two; blocks, and all of a share's, that nobody sees."""
    arguments = inputs(lanes=2, slots=20, heads=8, width=20, length=300, columns=600)
    arguments["lengths"] = np.array([290, 3], np.int32)
    if columns_seen != "some":
        arguments["own_mask"][:, 40:] = False
        arguments["own_mask"][:, :40] &= columns_seen == "few"
    assert_equal(gpu_kernel(**arguments), slot_by_slot(**arguments))


def test_gpu_kernel_reads_no_block_that_nobody_sees():
    """What it does not read may be NaN."""
    arguments = inputs(length=300, columns=300)
    arguments["lengths"] = np.array([60, 64], np.int32)
    arguments["own_mask"][:, 128:192] = False
    expected = slot_by_slot(**arguments)
    for name, unseen in (("keys", slice(128, 192)), ("prompt_keys", slice(64, None))):
        arguments[name][..., unseen] = np.nan
        arguments[name.replace("keys", "values")][..., unseen, :] = np.nan
    assert_equal(gpu_kernel(**arguments), expected)


def test_gpu_kernel_without_a_prompt():
    arguments = inputs(length=0)
    assert_equal(gpu_kernel(**arguments), slot_by_slot(**arguments))


@pytest.mark.slow
def test_lowers_for_cuda():
    def cache(*shape):
        return jax.ShapeDtypeStruct((28, *shape), jnp.bfloat16)

    text = text_for_cuda(
        prefix_decode_attention_gpu.prefix_decode_attention,
        jax.ShapeDtypeStruct((256, 28, 128), jnp.bfloat16),
        cache(128, 4, 128, 2048),
        cache(128, 4, 2048, 128),
        jax.ShapeDtypeStruct((128,), jnp.int32),
        cache(256, 4, 128, 2048),
        cache(256, 4, 2048, 128),
        jax.ShapeDtypeStruct((256, 2048), bool),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    assert text.count("__gpu$xla.gpu.triton") == 2  # prompts, own columns


@pytest.mark.parametrize("attend", [pytest.param(kernel, marks=pytest.mark.slow), gpu_kernel])
def test_kernel_in_bfloat16(attend):
    arguments = inputs(slots=4, width=16, dtype="bfloat16")
    assert_equal(attend(**arguments), slot_by_slot(**arguments), atol=0.03)


@pytest.mark.parametrize("attend", [reference, kernel, gpu_kernel])
def test_a_slot_that_sees_nothing_gives_zeros(attend):
    arguments = inputs()
    arguments["own_mask"][5] = False
    arguments["lengths"] = np.array([2, 0], np.int32)
    out, logsumexp = map(np.asarray, attend(**arguments))
    assert np.all(out[5] == 0)
    assert np.all(logsumexp[5] < -1e28)
    assert_equal((out, logsumexp), slot_by_slot(**arguments))


@pytest.mark.parametrize("attend", [reference, kernel, gpu_kernel])
def test_what_is_not_seen_changes_nothing(attend):
    """Stale columns and padding may hold anything finite."""
    arguments = inputs()
    before = attend(**arguments)
    hidden = ~arguments["own_mask"][:, None, None]
    padding = (np.arange(5) >= arguments["lengths"][:, None])[:, None, None]
    for name, unseen in (("keys", hidden), ("prompt_keys", padding)):
        arguments[name] = np.where(unseen, np.float32(1e4), arguments[name])
        values = name.replace("keys", "values")
        arguments[values] = np.where(unseen.swapaxes(-2, -1), np.float32(1e4), arguments[values])
    for a, b in zip(before, attend(**arguments), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("attend", [reference, kernel, gpu_kernel])
def test_extreme_scores(attend):
    arguments = inputs()
    arguments["q"] *= 1e4
    out, logsumexp = map(np.asarray, attend(**arguments))
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(logsumexp))
    values = [arguments[name][LAYER] for name in ("values", "prompt_values")]
    assert np.abs(out).max() <= max(np.abs(x).max() for x in values)


def test_parts_join_by_their_logsumexp():
    """Half of the prompt and the rest, weighed by their sums, are the whole."""
    arguments = inputs(length=6) | {"lengths": np.array([6, 6], np.int32)}
    whole = reference(**arguments)[0]
    keys, values = arguments["prompt_keys"], arguments["prompt_values"]
    halves = [(keys[..., :3], values[..., :3, :]), (keys[..., 3:], values[..., 3:, :])]
    masks = [np.zeros_like(arguments["own_mask"]), arguments["own_mask"]]
    (first, a), (rest, b) = (
        reference(
            **arguments
            | {"prompt_keys": k, "prompt_values": v, "own_mask": mask}
            | {"lengths": np.array([3, 3], np.int32)}
        )
        for (k, v), mask in zip(halves, masks, strict=True)
    )
    share = 1 / (1 + np.exp(np.asarray(b) - a))[..., None]
    np.testing.assert_allclose(share * first + (1 - share) * rest, whole, atol=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"'cuda'.*xla"):
        prefix_decode_attention(**on_device(inputs()), implementation="cuda")
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        reference(**inputs(heads=3, kv_heads=2))
    one = inputs(lanes=3, slots=1)
    prompts = {name: inputs()[name] for name in ("prompt_keys", "prompt_values", "lengths")}
    with pytest.raises(ValueError, match="3 slots cannot be spread over 2 lanes"):
        reference(**(one | prompts))
