"""A Hugging Face checkpoint with a chat template through every stage, and back to transformers.

The model is tiny and random, so a rule stands in for it where stage I needs text that can be read.
"""

import json
import random
import shutil

import jax
import numpy as np
import pytest
import tokenizers as hf
from experiment_runs import Stop, metric_rows, stop_at, weights
from transformers import PreTrainedTokenizerFast

from spark_jax.data.records import Example, append_jsonl
from spark_jax.evaluation.processbench import ProcessBenchSample
from spark_jax.experiments import (
    checks,
    configuration,
    evaluate,
    generate_verifications,
    loading,
    sft,
    train_prm,
    train_rl,
)
from spark_jax.experiments.configuration import ConfigError
from spark_jax.models import checkpoints, transformer
from spark_jax.models.config import ModelConfig
from spark_jax.tasks import word_problems
from spark_jax.text_generation import SampledText

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|stop|>")


def byte_tokenizer():
    words = [*SPECIAL, *sorted(hf.pre_tokenizers.ByteLevel.alphabet())]
    backend = hf.Tokenizer(hf.models.BPE({w: i for i, w in enumerate(words)}, []))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    backend.add_special_tokens([hf.AddedToken(w, special=True) for w in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a checkpoint whose turns end with either of two tokens."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        vocab_size=len(tokenizer), width=16, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=8, mlp_width=16, qkv_bias=True,
    )  # fmt: skip
    params = transformer.init(config, jax.random.key(0))
    checkpoints.save_hf(path, params, config, tokenizer, stop_ids=(0, 4))
    return str(path)


@pytest.fixture(scope="module")
def config(base):
    small = {
        "model": base,
        "evaluate.generator": base,
        "sft.num_examples": 8,
        "sft.steps": 4,
        "sft.batch_size": 2,
        "sft.max_length": 1024,
        "sft.optimizer.warmup_steps": 1,
        "decode.max_new_tokens": 24,
        "decode.max_prompt_length": 1024,
        "generate.num_problems": 4,
        "generate.samples_per_problem": 2,
        "verify.methods": ("single", "step_consistency"),
        "verify.samples_per_solution": 2,
        "verify.report_sample_counts": (2,),
        "prm.steps": 2,
        "prm.balance": False,
        "prm.batch_size": 2,
        "prm.max_length": 1500,
        "prm.optimizer.warmup_steps": 1,
        "rl.steps": 2,
        "rl.num_problems": 4,
        "rl.prompts_per_step": 2,
        "rl.group_size": 2,
        "rl.evaluate_every": 2,
        "rl.save_every": 1,
        "evaluate.num_problems": 2,
        "evaluate.samples_per_problem": 1,
        "evaluate.num_solutions": 2,
    }
    return configuration.changed(
        configuration.load_config("configs/smollm2_word_problems.py"), small
    )


def answers_by_rule(model, options, statistics):
    """In place of `text_sampler`: solutions with errors, and verifications by their truth."""

    def sample(prompts, *, samples_per_prompt, settings, seed):
        assert all(p.startswith("<|system|>You are careful.<|end|><|user|>") for p in prompts)
        assert all(p.endswith("<|end|><|assistant|>") for p in prompts)
        return [[say(prompt, seed + i) for i in range(samples_per_prompt)] for prompt in prompts]

    def say(prompt, seed):
        question = next(line for line in prompt.splitlines() if line.startswith("A "))
        chain = word_problems.read_question(question.split("<|end|>")[0])
        stated = [word_problems.read_step(line) for line in prompt.splitlines()]
        steps = [step for step in stated if step is not None]
        if steps:
            return SampledText(word_problems.write_verification(chain, steps).text, (0,), True)
        rng = random.Random(f"{prompt}{seed}")
        steps = word_problems.noisy_solution(chain, 0.25, rng)
        return SampledText(word_problems.write_solution(steps, steps[-1].value), (0,), True)

    return sample


@pytest.fixture(scope="module")
def stage1(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("stage1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_verifications, "text_sampler", answers_by_rule)
        summary = generate_verifications.run(config, path)
    assert summary["methods"]["single"]["step_accuracy"] == 1
    return path


@pytest.fixture(scope="module")
def reward_model(config, stage1, tmp_path_factory):
    path = tmp_path_factory.mktemp("prm")
    summary = train_prm.run(configuration.changed(config, {"prm.data": str(stage1)}), path)
    assert summary["num_examples"] == 8
    assert summary["num_too_long"] == 0
    return path


def fine_tuning(config):
    return configuration.changed(config, {"sft.save_every": 2, "sft.optimizer.learning_rate": 3e-3})


def test_fine_tuning_learns_from_rendered_prompts(config, tmp_path):
    sft.run(fine_tuning(config), tmp_path)
    losses = [row["train/loss"] for row in metric_rows(tmp_path)]
    assert losses[-1] < losses[0]
    prompt, target = sft.task_examples(config, byte_tokenizer())[0]
    assert prompt.startswith("<|system|>You are careful.<|end|><|user|>Solve the problem")
    assert target.startswith("<think>\n<step>")


@pytest.mark.slow
def test_fine_tuning_resumes_bit_for_bit(config, tmp_path):
    """As `test_stages.py` has it of a reward model, by the same loop."""
    config = fine_tuning(config)
    whole = sft.run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        sft.run(config, tmp_path / "cut", stop_at(4))  # after a save at 2, before one at 4
    assert sft.run(config, tmp_path / "cut") == whole
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert metric_rows(tmp_path / "cut") == metric_rows(tmp_path / "whole")


def test_examples_may_come_from_a_file(config, tmp_path):
    own = tmp_path / "own.jsonl"
    append_jsonl(own, [Example("2 + 2?", "4"), Example("3 + 3?", "6")])
    read = sft.task_examples(
        configuration.changed(config, {"sft.data": str(own)}), byte_tokenizer()
    )
    assert read[1] == (
        "<|system|>You are careful.<|end|><|user|>3 + 3?<|end|><|assistant|>",
        "6",
    )
    own.write_text(own.read_text() + '{"prompt": "no target"}\n')
    with pytest.raises(ConfigError, match=rf"sft\.data: .*{own.name}:\d+.*target"):
        sft.task_examples(configuration.changed(config, {"sft.data": str(own)}), byte_tokenizer())

    no_examples = configuration.changed(config, {"task": "gsm8k", "sft.data": ""})
    with pytest.raises(ConfigError, match="task='gsm8k' has no examples of its own"):
        sft.task_examples(no_examples, byte_tokenizer())


@pytest.mark.slow
def test_a_reward_model_is_tried_on_processbench(config, reward_model, tmp_path):
    samples = [
        ProcessBenchSample(f"s{i}", "What is 1 + 1 + 1?", ("1 + 1 = 2", "2 + 1 = 4"), label, False)
        for i, label in enumerate((1, -1, 0))
    ]
    rows = [{**vars(sample), "steps": list(sample.steps)} for sample in samples]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "gsm8k.json").write_text(json.dumps(rows))
    changes = {
        "model": str(reward_model / "model"),
        "evaluate.what": "processbench",
        "evaluate.processbench.folder": str(folder),
    }
    summary = evaluate.run(configuration.changed(config, changes), tmp_path / "run")
    scores = summary["splits"]["gsm8k"]
    assert (scores["erroneous"], scores["correct"]) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["grpo", "spro"])
def test_rl_with_it_gives_a_policy_that_transformers_speaks_for(
    config, base, reward_model, tmp_path, advantage
):
    changes = {"rl.reward_model": str(reward_model / "model"), "rl.advantage": advantage}
    changes |= {"rl.reward": "process_aware_outcome"}
    summary = train_rl.run(configuration.changed(config, changes), tmp_path)
    assert summary["evaluation"]["num_problems"] == 2
    exported = tmp_path / "model"
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [0, 4]
    assert loading.load_model(str(exported)).stop_ids == (0, 4)
    assert same_greedy_text(exported)


def test_a_tokenizer_of_another_model_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    larger = byte_tokenizer()
    larger.add_tokens(["one too many"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 262 tokens, its embedding 261"):
        loading.load_model(str(tmp_path))


def same_greedy_text(path):
    """What transformers and we say to the same question."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spark_jax import decoding

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        said = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)
    loaded = loading.load_model(str(path))
    rollout = decoding.generate(
        decoding.layout(loaded.params, loaded.config),
        loaded.config,
        [ids],
        key=jax.random.key(0),
        sampling=decoding.Sampling(greedy=True, stop_ids=loaded.stop_ids),
        max_new_tokens=12,
    )
    ours = np.asarray(rollout.tokens)[0][np.asarray(rollout.mask)[0]]
    return said[0, len(ids) :].tolist() == ours.tolist()


def test_a_task_without_references_goes_through_all_stages(config, base, tmp_path, monkeypatch):
    """`gsm8k` from a file of our own, its answers not read."""
    file = tmp_path / "train.jsonl"
    questions = [p.question for p in word_problems.problems(8, 0, "train")]
    file.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    changes = {
        "task": "problems",
        "task_options.data": str(file),
        "task_options.eval_fraction": 0.4,
        "task_options.references": False,
    }
    blind = configuration.changed(config, changes)
    with monkeypatch.context() as patch:
        patch.setattr(generate_verifications, "text_sampler", answers_by_rule)
        stage1 = generate_verifications.run(blind, tmp_path / "stage1")
    assert stage1["methods"]["single"]["overall_accuracy"] is None
    assert stage1["methods"]["single"]["validity_rate"] == 1
    with pytest.raises(ConfigError, match=r"rl.reward='rule_based' needs reference answers"):
        checks.check_rl(configuration.changed(blind, {"rl.reward": "rule_based"}))
    with pytest.raises(ConfigError, match="'reference_guided' needs reference answers"):
        checks.check_stage1(configuration.changed(blind, {"verify.methods": ("reference_guided",)}))
    elsewhere = {"prm.data": str(tmp_path / "stage1"), "task_options.eval_fraction": 0.5}
    with pytest.raises(ConfigError, match=r"made with other task_options: \['eval_frac"):
        train_prm.run(configuration.changed(blind, elsewhere), tmp_path / "prm")
    blind = configuration.changed(blind, {"prm.data": str(tmp_path / "stage1")})
    prm = train_prm.run(blind, tmp_path / "prm")
    assert prm["held_out"]["overall_accuracy"]["estimate"] is None
    model = {"rl.reward_model": str(tmp_path / "prm" / "model")}
    rl = train_rl.run(configuration.changed(blind, model), tmp_path / "rl")
    assert rl["evaluation"]["accuracy"]["estimate"] is None
    assert not any("accuracy" in name for row in metric_rows(tmp_path / "rl") for name in row)
