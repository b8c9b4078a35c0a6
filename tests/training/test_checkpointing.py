import functools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG, params

from spark_jax.models.config import ModelConfig
from spark_jax.training import optimizer as optimizers
from spark_jax.training import state as train_state
from spark_jax.training.checkpointing import Checkpoints, TemplateMismatch
from spark_jax.training.sft import SFTBatch, sft_step


def fresh_run(*, key=None, width=16):
    """State and step function of a run, all objects new."""
    config = ModelConfig(**{**vars(CONFIG), "width": width})
    optimizer = optimizers.make(
        {"learning_rate": 0.01, "schedule": "cosine", "total_steps": 9, "clip_norm": 1.0}
    )
    state = train_state.create(params(config), optimizer, jax.random.key(5) if key is None else key)
    step = jax.jit(functools.partial(sft_step, model_config=config, optimizer=optimizer))
    return state, step


def batch_for(state):
    """Drawn from the state's key and step, as a resumed run draws it."""
    return _batch_for(state)


@jax.jit
def _batch_for(state):
    tokens = jax.random.randint(jax.random.fold_in(state.key, state.step), (4, 8), 0, 11)
    return SFTBatch(tokens=tokens, loss_mask=jnp.ones((4, 8), bool))


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.dtype == b.dtype, path
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    state, step = fresh_run()
    history = [state]
    for _ in range(5):
        state, _ = step(state, batch_for(state))
        history.append(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, history[2], {"position": {"epoch": 0, "row": 8}, "rows": 2})

    template, _ = fresh_run()
    with Checkpoints(tmp_path) as checkpoints:
        resumed, extra = checkpoints.restore_latest(template)
    assert extra == {"position": {"epoch": 0, "row": 8}, "rows": 2}
    assert_same_bits(resumed, history[2])
    for _ in range(3):
        resumed, _ = step(resumed, batch_for(resumed))
    assert_same_bits(resumed, history[5])
    assert not np.array_equal(history[5].params.embedding, history[2].params.embedding)


def test_awkward_leaves_come_back_bit_for_bit(tmp_path):
    odd = jnp.asarray([np.nan, np.inf, -0.0, 1e-45], jnp.float32)
    tree = {"odd": odd, "half": odd.astype(jnp.bfloat16), "none": None, "list": [odd, ()]}
    for i, key in enumerate((jax.random.PRNGKey(3), jax.random.key(3, impl="rbg"))):
        state = train_state.create(tree, optax.sgd(0.1, momentum=0.9), key)
        with Checkpoints(tmp_path / str(i)) as checkpoints:
            checkpoints.save(0, state)
            shapes = jax.eval_shape(lambda s: s, state)
            restored, extra = checkpoints.restore_latest(shapes)
        assert_same_bits(restored, state)
        assert extra == {}


def test_only_the_newest_are_kept_and_an_empty_folder_has_none(tmp_path):
    state, _ = fresh_run()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore_latest(state) is None
        for step in (1, 5, 9):
            checkpoints.save(step, state, {"step": step})
        assert checkpoints.steps() == [5, 9]
        assert checkpoints.restore_latest(state)[1] == {"step": 9}
        with pytest.raises(ValueError, match=r"cannot save step 9 .* step 9 is there already"):
            checkpoints.save(9, state)


def test_every_nth_is_kept_beside_the_newest(tmp_path):
    state, _ = fresh_run()
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, state)
        assert checkpoints.steps() == [4, 8, 10]


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The write goes on behind the updates, which take over the state's memory."""
    state, step = fresh_run()
    state = jax.tree.map(jnp.copy, state)  # other tests have the same parameters
    step = jax.jit(step, donate_argnums=0)
    wanted = []
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for i in range(4):
            wanted.append(jax.tree.map(jnp.copy, state))
            checkpoints.save(i, state)
            state, _ = step(state, batch_for(state))
    for i in reversed(range(4)):
        with Checkpoints(tmp_path, keep=None) as checkpoints:
            assert_same_bits(checkpoints.restore_latest(wanted[i])[0], wanted[i])
        shutil.rmtree(tmp_path / str(i))


def test_several_runs_of_a_process_save_at_once(tmp_path):
    """As the threads of a pipeline do."""
    state, _ = fresh_run()

    def run(name):
        with Checkpoints(tmp_path / name, keep=2) as checkpoints:
            for step in range(6):
                checkpoints.save(step, state.replace(step=state.step + step))
            return int(checkpoints.restore_latest(state)[0].step)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(run, "abc")) == [5, 5, 5]


def test_a_write_that_fails_is_raised_and_the_one_before_stands(tmp_path, monkeypatch):
    state, _ = fresh_run()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    monkeypatch.setattr("os.rename", full)
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        checkpoints.save(2, state)
        checkpoints.wait()
    monkeypatch.undo()
    with Checkpoints(tmp_path) as again:
        assert again.steps() == [1]
        assert_same_bits(again.restore_latest(state)[0], state)


def damage_file(file, damage):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])


def without_digests(folder):
    """As a version that noted none left it."""
    for file in folder.rglob("digests*.json"):
        file.unlink()


def files_that_matter(folder):
    return {
        "values": max((folder / "state").rglob("d/*"), key=lambda f: f.stat().st_size),
        "merged": max((folder / "state" / "d").iterdir(), key=lambda f: f.stat().st_size),
        "index": folder / "state" / "manifest.ocdbt",
        "tree": folder / "state" / "_METADATA",
        "extra": folder / "extra" / "metadata",
        "sharding": folder / "state" / "_sharding",
    }


WHICH, DAMAGES = (
    ("values", "merged", "index", "tree", "sharding", "extra"),
    ("cut", "flipped", "gone"),
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("which", "damage"),
    [
        pytest.param(which, damage, marks=[] if (i - j) % 3 == 0 else [pytest.mark.slow])
        for i, which in enumerate(WHICH)
        for j, damage in enumerate(DAMAGES)
    ],
)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(tmp_path, which, damage):
    state, _ = fresh_run(width=128)  # small values would lie in the index
    later = state.replace(step=state.step + 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"step": 3})
        checkpoints.save(4, later, {"step": 4})
    file = files_that_matter(tmp_path / "4")[which]
    assert which != "values" or file.stat().st_size > 2**14  # orbax may write several
    damage_file(file, damage)

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match=r"4 cannot be read .* 4\.torn, going on from step 3"):
            restored, extra = checkpoints.restore_latest(state)
        assert extra == {"step": 3}
        assert_same_bits(restored, state)
        checkpoints.save(4, later, {"step": 4})  # the resumed run comes past the same step again
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(state)[1] == {"step": 4}
        assert (tmp_path / "4.torn").is_dir()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [None, "cut", "gone"])
def test_a_checkpoint_without_digests_is_accepted_unless_it_cannot_be_read(tmp_path, damage):
    """As one of an older version; orbax raises a bare Exception on a lost data file."""
    state, _ = fresh_run(width=64)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        checkpoints.save(4, state)
    without_digests(tmp_path)
    if damage is not None:
        damage_file(files_that_matter(tmp_path / "4")["values"], damage)
    with Checkpoints(tmp_path) as checkpoints:
        if damage is None:
            assert_same_bits(checkpoints.restore_latest(state)[0], state)
            return
        with pytest.warns(UserWarning, match=r"4\.torn, going on from step 3"):
            restored, _ = checkpoints.restore_latest(state)
        assert_same_bits(restored, state)


@pytest.mark.parametrize("kind", [MemoryError, jax.errors.JaxRuntimeError])
def test_a_device_without_room_says_nothing_about_the_checkpoint(tmp_path, monkeypatch, kind):
    state, _ = fresh_run()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        checkpoints.save(4, state)

        def full(step, template):
            try:
                raise kind("RESOURCE_EXHAUSTED: out of memory")
            except kind as error:
                raise Exception("a wrapped one, as orbax's") from error

        monkeypatch.setattr(checkpoints, "_restore", full)
        with pytest.raises(kind, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore_latest(state)
        assert checkpoints.steps() == [3, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    state, _ = fresh_run()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    shutil.rmtree(tmp_path / "3" / "state" / "d")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .*step 3"):
            checkpoints.restore_latest(state)
        assert checkpoints.steps() == [3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_typed_key_never_comes_back_as_plain_numbers(tmp_path):
    state, _ = fresh_run()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    without_digests(tmp_path)
    files_that_matter(tmp_path / "3")["sharding"].unlink()
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="key came back as uint32"),
    ):
        checkpoints.restore_latest(jax.eval_shape(lambda s: s, state))


def test_another_model_is_refused_by_name_and_nothing_is_set_aside(tmp_path):
    state, _ = fresh_run()
    other, _ = fresh_run(width=24)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        with pytest.raises(TemplateMismatch, match=r"params\.\w+.*wanted .*24.* and \d+ more"):
            checkpoints.restore_latest(other)
        half = state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
        with pytest.raises(TemplateMismatch, match=r"saved .*float32.* wanted .*bfloat16"):
            checkpoints.restore_latest(half)
        assert checkpoints.steps() == [3]


@pytest.mark.parametrize("extra", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": object()}, {"a": np.nan}])
def test_extra_that_would_not_come_back_is_refused(tmp_path, extra):
    state, _ = fresh_run()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="extra="):
            checkpoints.save(1, state, extra)
        assert checkpoints.steps() == []


def test_a_save_that_died_half_way_is_not_seen(tmp_path):
    state, _ = fresh_run()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    shutil.copytree(tmp_path / "3", tmp_path / "4.orbax-checkpoint-tmp-12")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3]
        assert_same_bits(checkpoints.restore_latest(state)[0], state)
