import json
import warnings

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from spark_jax.training.run_folder import OtherRun, RunFolder, differences, versions


def config(**changes):
    base = {
        "seed": 0,
        "name": None,
        "rl": {"learning_rate": 1e-6, "betas": (0.9, 0.95), "schedule": {}},
    }
    return ml_collections.ConfigDict({**base, **changes})


def test_a_new_folder_holds_the_resolved_config_the_versions_and_the_subfolders(tmp_path):
    cfg = config()
    cfg.alias = cfg.get_ref("seed")
    run = RunFolder.open(tmp_path / "runs" / "a", cfg)
    assert not run.resumed
    written = json.loads((run.path / "config.json").read_text())
    assert written == run.config
    assert written["alias"] == 0
    assert written["rl"] == {"learning_rate": 1e-6, "betas": [0.9, 0.95], "schedule": {}}
    assert json.loads((run.path / "versions.json").read_text()) == versions()
    assert versions()["jax"] == jax.__version__
    assert versions()["device_kind"] == jax.devices()[0].device_kind
    for folder in (run.checkpoints, run.samples, run.plots):
        assert folder.is_dir()
        assert folder.parent == run.path


def test_the_same_config_resumes_whether_dict_or_config_dict(tmp_path):
    RunFolder.open(tmp_path, config())
    assert RunFolder.open(tmp_path, config()).resumed
    assert RunFolder.open(tmp_path, config().to_dict()).resumed
    nested = {**config().to_dict(), "rl": config().rl}
    assert RunFolder.open(tmp_path, nested).resumed


def test_another_config_is_refused_field_by_field_and_leaves_the_folder_alone(tmp_path):
    RunFolder.open(tmp_path, config())
    before = (tmp_path / "config.json").read_text()
    other = config(seed=1)
    other.rl.learning_rate = 5e-7
    other.rl.schedule = {"kind": "cosine"}
    del other.name
    other.extra = True
    with pytest.raises(ValueError, match="another configuration") as caught:
        RunFolder.open(tmp_path, other)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "extra: absent in the folder, true now",
        "name: null in the folder, absent now",
        "rl.learning_rate: 1e-06 in the folder, 5e-07 now",
        'rl.schedule.kind: absent in the folder, "cosine" now',
        "seed: 0 in the folder, 1 now",
    ]
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"a": {"b": [1, {2}]}}, r"config\.a\.b\[1\]=\{2\}"),
        ({"a": np.float32(1)}, r"config\.a="),
        ({"a": float("nan")}, r"config\.a=nan"),
        ({"a": {1: 2}}, r"config\.a has the key 1"),
    ],
)
def test_what_is_not_json_is_refused_by_its_field(tmp_path, bad, field):
    with pytest.raises(ValueError, match=field):
        RunFolder.open(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()


def test_results_of_unknown_origin_are_not_adopted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl but no config\.json"):
        RunFolder.open(tmp_path, config())


def test_differences_are_named_field_by_field():
    one = {"a": [1, 2], "b": {"c": 1, "d": 2}}
    assert differences(one, {"a": (1, 2), "b": {"c": 1, "d": 3}, "e": None}) == [
        "b.d: 2 in the folder, 3 now",
        "e: absent in the folder, null now",
    ]


def test_fields_that_a_version_added_or_removed_count_as_their_former_default(tmp_path):
    """Both ways, and a section without fields is no difference; any other value is one."""
    started = RunFolder.open(tmp_path, {"a": 1, "rl": {"gone": 0.5}, "empty": {}})
    former = {"rl.new": None, "rl.gone": 0.5, "tuple": (1, 2)}
    now = {"a": 1, "rl": {"new": None, "section": {}}, "tuple": [1, 2]}
    resumed = RunFolder.open(tmp_path, now, former)
    assert resumed.resumed
    assert resumed.identity == started.identity  # its checkpoints are those of the same run
    assert RunFolder.open(tmp_path, now, former).identity == started.identity
    for changed, line in [
        ({"rl": {"new": 1e-5}}, "rl.new: absent in the folder, 1e-05 now"),
        ({"rl": {"gone": 0.4}}, "rl.gone: 0.5 in the folder, 0.4 now"),
        ({"tuple": [2, 1]}, "tuple: absent in the folder, [2, 1] now"),
        ({"other": None}, "other: absent in the folder, null now"),
        ({"rl": {"section": {"x": 0}}}, "rl.section.x: absent in the folder, 0 now"),
    ]:
        with pytest.raises(OtherRun, match="another configuration") as caught:
            RunFolder.open(tmp_path, now | changed, former)
        assert str(caught.value).splitlines()[1:] == [f"  {line}"]
    with pytest.raises(OtherRun, match=r"rl.new: absent in the folder, null now"):
        RunFolder.open(tmp_path, now)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run, other = (RunFolder.open(tmp_path / str(i), config(seed=i)) for i in range(2))
    run.check_identity(run.identity | {"rollouts": 3})
    run.check_identity({"rollouts": 3})  # written before checkpoints noted it
    with pytest.raises(OtherRun, match="was written by a run of another configuration"):
        other.check_identity(run.identity)
    assert run.identity["versions"] == versions()


def test_changed_versions_are_reported_and_recorded(tmp_path):
    run = RunFolder.open(tmp_path, config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RunFolder.open(tmp_path, config())
    path = run.path / "versions.json"
    path.write_text(json.dumps({**versions(), "jax": "0.0.1"}))
    with pytest.warns(UserWarning, match=rf"jax 0\.0\.1 -> {jax.__version__}"):
        RunFolder.open(tmp_path, config())
    assert json.loads(path.read_text()) == versions()


def test_summary_takes_array_scalars_and_survives_a_failed_write(tmp_path):
    run = RunFolder.open(tmp_path, config())
    run.write_summary({"f1": jnp.float32(0.5), "per": {"n": np.int64(3)}, "gap": [float("nan")]})
    want = {"f1": 0.5, "per": {"n": 3}, "gap": ["nan"]}
    assert json.loads((tmp_path / "summary.json").read_text()) == want
    with pytest.raises(ValueError, match=r"summary\.f1="):
        run.write_summary({"f1": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == want
