"""Shared prompt and own tokens: a loop over slots, and the TPU kernel under its interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from spark_jax.kernels import prefix_decode_attention_tpu
from spark_jax.kernels.prefix_decode_attention import prefix_decode_attention

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.fixture(autouse=True)
def no_races(capfd):
    """The interpreter prints what it finds and goes on."""
    yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out


def inputs(lanes=2, slots=3, heads=4, kv_heads=2, width=8, length=5, columns=7, dtype="float32"):
    keys = iter(jax.random.split(jax.random.key(length + columns), 7))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    return {
        "q": 2 * normal(lanes, slots, heads, width),
        "prompt_keys": normal(lanes, kv_heads, length, width),
        "prompt_values": normal(lanes, kv_heads, length, width),
        "lengths": jax.random.randint(next(keys), lanes, 0, length + 1),
        "keys": normal(lanes, slots, kv_heads, columns, width),
        "values": normal(lanes, slots, kv_heads, columns, width),
        "own_mask": jax.random.bernoulli(next(keys), 0.5, (lanes, slots, columns)),
    }


def slot_by_slot(q, prompt_keys, prompt_values, lengths, keys, values, own_mask):
    """Each head of each slot with its own copy of what it sees."""
    arrays = (q, prompt_keys, prompt_values, keys, values)
    q, prompt_keys, prompt_values, keys, values = (np.asarray(x, np.float64) for x in arrays)
    out, logsumexp = np.zeros(q.shape), np.full(q.shape[:-1], -1e29)
    for r, w, h in np.ndindex(*q.shape[:-1]):
        g = h // (q.shape[2] // keys.shape[2])
        mine = np.asarray(own_mask[r, w])
        k = np.concatenate([prompt_keys[r, g, : lengths[r]], keys[r, w, g, mine]])
        v = np.concatenate([prompt_values[r, g, : lengths[r]], values[r, w, g, mine]])
        if len(k):
            weights = np.exp(k @ q[r, w, h] / np.sqrt(q.shape[-1]))
            out[r, w, h] = weights @ v / weights.sum()
            logsumexp[r, w, h] = np.log(weights.sum())
    return out, logsumexp


def kernel(**arguments):
    return prefix_decode_attention_tpu.prefix_decode_attention(
        *arguments.values(), interpret=INTERPRET
    )


def assert_equal(got, expected, atol=1e-5):
    np.testing.assert_allclose(got[0].astype(jnp.float32), expected[0], atol=atol)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_reference_slot_by_slot(heads, kv_heads):
    arguments = inputs(heads=heads, kv_heads=kv_heads)
    assert_equal(prefix_decode_attention(**arguments), slot_by_slot(**arguments))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(prefix_decode_attention_tpu, "_block", lambda tokens, _: min(tokens, 4))
    prefix_decode_attention_tpu.prefix_decode_attention.clear_cache()
    yield
    prefix_decode_attention_tpu.prefix_decode_attention.clear_cache()


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"lanes": 1, "slots": 1, "heads": 1, "kv_heads": 1, "length": 1, "columns": 1},
        {"lanes": 3, "slots": 2, "heads": 9, "kv_heads": 3, "length": 6, "columns": 3},
    ],
)
def test_kernel_equals_the_loop(shape):
    arguments = inputs(**shape)
    assert_equal(kernel(**arguments), slot_by_slot(**arguments))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("length", "columns"), [(8, 8), (9, 6)])
def test_kernel_in_blocks(length, columns):
    """Whole blocks and ragged ends, of prompt and own columns; lanes without a prompt."""
    arguments = inputs(lanes=4, length=length, columns=columns)
    for lengths in ([0, length, 3, 5], [4, 1, 0, 8]):
        arguments["lengths"] = jnp.array(lengths)
        assert_equal(kernel(**arguments), slot_by_slot(**arguments))


def test_kernel_in_bfloat16():
    arguments = inputs(slots=4, width=16, dtype="bfloat16")
    assert_equal(kernel(**arguments), slot_by_slot(**arguments), atol=0.03)


@pytest.mark.parametrize("attend", [prefix_decode_attention, kernel])
def test_a_slot_that_sees_nothing_gives_zeros(attend):
    arguments = inputs()
    arguments["own_mask"] = arguments["own_mask"].at[1, 2].set(False)
    arguments["lengths"] = jnp.array([2, 0])
    out, logsumexp = attend(**arguments)
    assert np.all(np.asarray(out[1, 2]) == 0)
    assert np.all(np.asarray(logsumexp[1, 2]) < -1e28)
    assert_equal((out, logsumexp), slot_by_slot(**arguments))


@pytest.mark.parametrize("attend", [prefix_decode_attention, kernel])
def test_what_is_not_seen_changes_nothing(attend):
    """Stale columns and padding may hold anything finite."""
    arguments = inputs()
    before = attend(**arguments)
    hidden = ~arguments["own_mask"][:, :, None, :, None]
    for name in ("keys", "values"):
        arguments[name] = jnp.where(hidden, 1e4, arguments[name])
    padding = (jnp.arange(5) >= arguments["lengths"][:, None])[:, None, :, None]
    for name in ("prompt_keys", "prompt_values"):
        arguments[name] = jnp.where(padding, 1e4, arguments[name])
    for a, b in zip(before, attend(**arguments), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("attend", [prefix_decode_attention, kernel])
def test_extreme_scores(attend):
    arguments = inputs()
    arguments["q"] = arguments["q"] * 1e4
    out, logsumexp = attend(**arguments)
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(logsumexp))
    assert np.abs(out).max() <= max(np.abs(arguments[k]).max() for k in ("values", "prompt_values"))


def test_parts_join_by_their_logsumexp():
    """Half of the prompt and the rest, weighed by their sums, are the whole."""
    arguments = inputs(length=6)
    arguments["lengths"] = jnp.array([6, 6])
    whole = prefix_decode_attention(**arguments)[0]
    first = {k: arguments[k][:, :, :2] for k in ("prompt_keys", "prompt_values")}
    rest = {k: arguments[k][:, :, 2:] for k in ("prompt_keys", "prompt_values")}
    nothing = jnp.zeros_like(arguments["own_mask"])
    a = prefix_decode_attention(
        **(arguments | first | {"lengths": jnp.array([2, 2]), "own_mask": nothing})
    )
    b = prefix_decode_attention(**(arguments | rest | {"lengths": jnp.array([4, 4])}))
    share = jax.nn.sigmoid(a[1] - b[1])[..., None]
    np.testing.assert_allclose(share * a[0] + (1 - share) * b[0], whole, atol=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"'cuda'.*xla"):
        prefix_decode_attention(**inputs(), implementation="cuda")
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        prefix_decode_attention(**inputs(heads=3, kv_heads=2))
