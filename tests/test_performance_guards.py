"""What keeps programs fast and small, read from what XLA compiled: no timings, so that a busy
machine changes nothing.

Programs are compiled as users run them (fixture `optimised`) and never run. Of each kind of work
one is compiled in fast tests: decoding in bfloat16, and the policy step.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark_jax import decoding, scoring
from spark_jax.decoding import Sampling, decoder, generate
from spark_jax.models import transformer
from spark_jax.models.config import PROJECTIONS, ModelConfig
from spark_jax.training import optimizer, state
from spark_jax.training.policy import Objective, PolicyBatch, policy_step
from spark_jax.training.sft import SFTBatch, sft_step

VOCABULARY = 1031  # a prime: no other axis has it
DECODED = ModelConfig(
    vocab_size=VOCABULARY,
    width=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=96,
)
ROWS, PROMPT, COLUMNS = 8, 32, 64

pytestmark = pytest.mark.usefixtures("optimised")


class _Captured(Exception):
    """Carries the decode program out of `generate`, which then runs nothing."""


def laid_out(config):
    """Shapes of the parameters as decoding wants them on CPU."""
    return jax.eval_shape(
        lambda: decoding.layout(transformer.init(config, jax.random.key(0)), config)
    )


@functools.cache
def decode_program(dtype: str, samples: int):
    """What `generate` would run for ROWS rows in groups of `samples`: (lowered, compiled)."""
    config = dataclasses.replace(DECODED, dtype=dtype)
    params = laid_out(config)
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (ROWS // samples, PROMPT)).tolist()
    run = decoder.decode

    def capture(*args, **how):
        lowered = run.lower(*args, **how)
        raise _Captured(lowered, lowered.compile())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "decode", capture)
        try:
            generate(
                params,
                config,
                prompts,
                key=jax.random.key(0),
                sampling=Sampling(top_p=0.95, top_k=40, min_p=0.01),
                samples_per_prompt=samples,
                max_new_tokens=COLUMNS,
            )
        except _Captured as captured:
            return captured.args
    raise AssertionError("generate did not call decoder.decode")


@pytest.mark.parametrize(
    ("dtype", "samples"),
    [
        ("bfloat16", 1),
        pytest.param("float32", 1, marks=pytest.mark.slow),
        pytest.param("float32", 4, marks=pytest.mark.slow),
    ],
)
def test_decoding_copies_no_cache(dtype, samples):
    """No copy, transposition or conversion of a layer's whole cache for a token."""
    _, compiled = decode_program(dtype, samples)
    whole = ROWS * DECODED.num_kv_heads * DECODED.head_dim * COLUMNS
    scores = rf"\[[\d,]*\b{VOCABULARY}\b[\d,]*\]\S* (dot|custom-call)\("
    steps = step_bodies(compiled.as_text(), scores)
    assert steps
    moved = [x for x in steps if re.search(r" (copy|transpose|convert)\(", x)]
    assert [line for line in moved if elements(line) >= whole] == []


PROGRAM = """
%fused (p: f32[8,64,2]) -> f32[8,2,64] {
  %p = f32[8,64,2]{2,1,0} parameter(0)
  ROOT %transpose.1 = f32[8,2,64]{2,1,0} transpose(%p), dimensions={0,2,1}
}

%inner (q: (f32[8,64,2], f32[8,1031])) -> (f32[8,64,2], f32[8,1031]) {
  %q = (f32[8,64,2]{2,1,0}, f32[8,1031]{1,0}) parameter(0)
  %moved = f32[8,2,64]{2,1,0} fusion(%q), kind=kLoop, calls=%fused
  %scores = f32[8,1031]{1,0} dot(%moved, %moved)
}

%outer (r: (f32[8,64,2], f32[8,1031])) -> (f32[8,64,2], f32[8,1031]) {
  %r = (f32[8,64,2]{2,1,0}, f32[8,1031]{1,0}) parameter(0)
  %copy.7 = f32[8,64,2]{2,1,0} copy(%r)
  ROOT %w = (f32[8,64,2]{2,1,0}, f32[8,1031]{1,0}) while(%r), condition=%c, body=%inner
}

ENTRY %main (a: f32[8,64,2]) -> f32[8,64,2] {
  %w.2 = (f32[8,64,2]{2,1,0}, f32[8,1031]{1,0}) while(%a), condition=%c, body=%outer
}
"""


def test_programs_are_read_rightly():
    """The inner loop with what it calls, and nothing of the outer."""
    lines = step_bodies(PROGRAM, r"\b1031\].* dot\(")
    assert [elements(line) for line in lines if " transpose(" in line] == [8 * 2 * 64]
    assert not any("copy.7" in line for line in lines)
    assert step_bodies(PROGRAM, "no such thing") == []


def test_decoding_sorts_nothing():
    """Top-k and top-p find their cut without sorting the vocabulary."""
    lowered, compiled = decode_program("bfloat16", 1)
    assert re.findall(r"stablehlo\.sort|top_k|TopK", lowered.as_text()) == []
    assert [x for x in compiled.as_text().splitlines() if re.search(r" (sort|topk)\(", x)] == []


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_decoding_sets_little_aside(dtype):
    """The caches, what turns a ring, and a few rows of scores."""
    _, compiled = decode_program(dtype, 1)
    per_column = 2 * DECODED.num_layers * ROWS * DECODED.num_kv_heads * DECODED.head_dim
    cache = per_column * (COLUMNS + PROMPT) * 4  # on CPU parts of it are float32 in any case
    scores = ROWS * VOCABULARY * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * cache + 20 * scores


def test_looking_tokens_up_widens_no_table():
    """XLA:CPU has no gather of bfloat16: it would make a float32 copy of all of the embedding."""
    _, compiled = decode_program("bfloat16", 1)
    table = rf"(f32|bf16|u16)\[{VOCABULARY},{DECODED.width}\]"
    assert set(re.findall(table, compiled.as_text())) == {"bf16", "u16"}


def test_no_weight_is_turned_back_for_a_prefill():
    """XLA would do so before the loop that prefills, and keep the copies while it decodes."""
    config = dataclasses.replace(DECODED, dtype="bfloat16")
    layer = laid_out(config).layers[0]
    _, compiled = decode_program("bfloat16", 1)
    held = set(re.findall(r"bf16\[(\d+),(\d+)\]", compiled.as_text()))
    for weight in (layer.query_key_value, layer.gate_up, layer.down):
        rows, columns = map(str, weight.shape)
        assert (rows, columns) in held
        assert (columns, rows) not in held


def test_bfloat16_products_accumulate_in_float32():
    """Without it they are wrong, and on CPU slower than float32."""
    lowered, _ = decode_program("bfloat16", 1)
    results = dots(lowered.as_text())
    # Newer jax writes equal ones once.
    assert len(results) > (10 if jax.__version_info__ < (0, 11) else 6)
    assert set(results) == {"f32"}
    config = dataclasses.replace(DECODED, dtype="bfloat16")
    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    score = jax.jit(lambda p, t: scoring.token_logprobs(p, config, t))
    assert set(dots(score.lower(params, tokens).as_text())) == {"f32"}


# At SmolLM2's vocabulary, with a model so small that scores dominate all else.
TRAINED = ModelConfig(49152, 8, 2, 2, 1, 8, 16)
BATCH, CONTEXT, TOKENS = 16, 16, 240
SCORES = BATCH * TOKENS * TRAINED.vocab_size  # elements of all rows' scores: 0.75 GB in float32


works = pytest.mark.parametrize("work", ["policy", pytest.param("sft", marks=pytest.mark.slow)])


@functools.cache
def training_program(work: str):
    """The state, and the program compiled."""
    train, lowered = lowered_training(work, TRAINED)
    return train, lowered.compile()


def lowered_training(work: str, config: ModelConfig):
    adamw = optimizer.make(dict(name="adamw", learning_rate=1e-5, clip_norm=1.0))
    train = jax.eval_shape(
        lambda: state.create(transformer.init(config, jax.random.key(0)), adamw, jnp.zeros(2))
    )
    prompt, response = ((BATCH, n) for n in (CONTEXT, TOKENS))
    if work == "policy":
        batch = PolicyBatch(
            prompt_tokens=shape(prompt, jnp.int32),
            prompt_mask=shape(prompt, bool),
            tokens=shape(response, jnp.int32),
            mask=shape(response, bool),
            old_logprobs=shape(response),
            advantages=shape(response),
            ref_logprobs=shape(response),
        )
        step = functools.partial(policy_step, objective=Objective(kl_coefficient=0.01))
    else:
        whole = (BATCH, CONTEXT + TOKENS)
        batch = SFTBatch(tokens=shape(whole, jnp.int32), loss_mask=shape(whole, bool))
        step = sft_step
    step = functools.partial(step, model_config=config, optimizer=adamw)
    return train, jax.jit(step, donate_argnums=0).lower(train, batch)


@works
def test_a_train_step_never_holds_all_scores(work):
    _, compiled = training_program(work)
    largest = max(map(elements, compiled.as_text().splitlines()))
    assert TRAINED.vocab_size * TRAINED.width <= largest <= SCORES / 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * SCORES / 3


@works
def test_a_train_step_updates_its_state_in_place(work):
    train, compiled = training_program(work)
    weights = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves((train.params, train.opt_state))
    )
    assert compiled.memory_analysis().alias_size_in_bytes >= weights


@works
def test_no_bfloat16_product_is_one_that_a_cpu_has_in_float32_only(work):
    """XLA:CPU widens both operands where the first is summed over one axis that is not its last,
    and multiplies four times as slowly; with two such axes it transposes it."""
    _, lowered = lowered_training(work, dataclasses.replace(TRAINED, dtype="bfloat16"))
    narrow = r"contracting_dims = \[([\d, ]+)\] x .*: \(tensor<([^>]*)xbf16>, tensor<[^>]*bf16>\)"
    found = re.findall(narrow, lowered.as_text())
    assert len(found) > 20
    for summed, first in found:
        axes = [int(axis) for axis in summed.split(",")]
        assert len(axes) > 1 or axes == [first.count("x")], (summed, first)


@pytest.mark.slow  # test_scoring.py has it, in part, among fast tests
def test_scoring_never_holds_all_scores():
    params = jax.eval_shape(lambda: transformer.init(TRAINED, jax.random.key(0)))
    tokens = shape((BATCH, TOKENS + 1), jnp.int32)
    compiled = jax.jit(lambda p, t: scoring.token_logprobs(p, TRAINED, t)).lower(params, tokens)
    compiled = compiled.compile()
    assert max(map(elements, compiled.as_text().splitlines())) <= SCORES / 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.25e9


@pytest.mark.slow
def test_layers_that_are_computed_again_are_not_kept():
    """With rematerialisation temporaries do not grow with every layer's activations."""

    def temporaries(remat):
        config = ModelConfig(64, 64, 12, 4, 2, 16, 512, remat=remat)
        compiled = gradient_of_logprobs(config, shape((8, 256), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(remat=True) <= temporaries(remat=False) / 3


@pytest.mark.parametrize(
    ("stored", "products"),
    [
        (PROJECTIONS, 6),
        (("qkv_proj",), 3),
        *(
            pytest.param((name,), 1, marks=pytest.mark.slow)
            for name in ("out_proj", "gate_proj", "up_proj")
        ),
    ],
)
def test_what_is_stored_is_not_multiplied_again(stored, products):
    assert products_storing(()) - products_storing(stored) == products


@functools.cache
def products_storing(stored):
    config = ModelConfig(64, 64, 2, 4, 2, 16, 128, remat_save=stored)
    lowered = gradient_of_logprobs(config, shape((2, 8), jnp.int32))
    return lowered.as_text().count("dot_general")


def test_most_scores_above_the_diagonal_are_not_computed():
    length = 256
    params = jax.eval_shape(lambda: transformer.init(TRAINED, jax.random.key(0)))
    run = jax.jit(lambda p, t: transformer.forward(p, TRAINED, t))
    text = run.lower(params, shape((1, length), jnp.int32)).as_text()
    queries_of_keys = set(re.findall(r"tensor<(?:\d+x){2,}(\d+)x(\d+)xf32>", text))
    assert {("64", str(keys)) for keys in (64, 128, 192, 256)} <= queries_of_keys
    assert (str(length), str(length)) not in queries_of_keys


def gradient_of_logprobs(config, tokens):
    """The lowered gradient, by all parameters, of the mean log-prob of tokens."""
    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))

    def loss(p, t):
        return jnp.mean(scoring.token_logprobs(p, config, t))

    return jax.jit(jax.grad(loss)).lower(params, tokens)


def shape(sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def dots(text):
    """Result types of the products of two bfloat16 arrays in StableHLO."""
    pair = r"dot_general.*: \(tensor<[^>]*bf16>, tensor<[^>]*bf16>\) -> tensor<[^>]*?(\w+)>"
    return [x.rpartition("x")[2] for x in re.findall(pair, text)]


def elements(line):
    """Elements of an instruction's result; 0 for a tuple or anything else."""
    found = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]*)\]", line)
    return math.prod(int(x) for x in found[1].split(",") if x) if found else 0


def step_bodies(text, mark):
    """Lines of the innermost loops in whose bodies `mark` is found, with all that they call."""
    computations, loops = parse(text)
    reached = {name: closure(name, computations) for name in loops}
    lines = {name: [y for x in reached[name] for y in computations[x]] for name in loops}
    marked = {name for name in loops if any(re.search(mark, line) for line in lines[name])}
    inner = {x for x in marked if not any(y in reached[x] for y in marked - {x})}
    return [line for name in sorted(inner) for line in lines[name]]


def parse(text):
    """Lines of every computation, and which computations are bodies of loops."""
    computations, loops, lines = {}, set(), []
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            lines = computations.setdefault(opened[1], [])
        else:
            lines.append(line)
            loops.update(re.findall(r"\bbody=%?([\w.\-]+)", line))
    return computations, loops


def closure(name, computations):
    """The computation and all that it calls."""
    found, waiting = [], [name]
    while waiting:
        current = waiting.pop()
        if current in found or current not in computations:
            continue
        found.append(current)
        for line in computations[current]:
            for field in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line):
                waiting.append(field)
            for several in re.findall(
                r"(?:branch_computations|called_computations)=\{([^}]*)\}", line
            ):
                waiting.extend(x.strip().lstrip("%") for x in several.split(","))
            waiting.extend(re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line))
    return found
