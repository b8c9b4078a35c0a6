"""Step spans of odd texts, and step ids that are right for every single token."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spark_jax import steps

CORPUS = [
    "<think> <step> First, 3 + 4 = 7. </step>\n<step> Then 7 * 6 = 42, naïve café. </step>",
    "<answer> \\boxed{42} </answer> the sum of numbers is 12, 34 and 56",
    "## Step 1: compute\nthe value\n\n## Step 2: check it",
]


def contents(text, splitter=steps.tagged_steps):
    return list(steps.step_texts(text, splitter(text)))


# --- text -> spans -------------------------------------------------------------------------------


def test_a_span_covers_its_block_and_the_content_span_what_is_between_the_tags():
    text = "<think> <step> a b </step> x <step>c</step> </think> <answer> \\boxed{1} </answer>"
    spans = steps.tagged_steps(text)
    assert [text[a:b] for a, b in spans] == ["<step> a b </step>", "<step>c</step>"]
    assert [text[slice(*steps.content_span(text, s))] for s in spans] == ["a b", "c"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no tags at all", []),
        ("<step>a</step><step>b</step>", ["a", "b"]),
        ("<step>a <step>b</step> c</step> d", ["a", "b"]),  # nested
        ("<step>a <step>b</step>", ["a", "b"]),  # unclosed, then a step
        ("<step>a </think> b</step>", ["a"]),  # unclosed, then the end of the thinking
        ("<step>a <answer> 1 </answer>", ["a"]),
        ("<step>a", ["a"]),  # unclosed at the end
        ("<step>", []),
        ("a</step> b </step><step>c</step></step>", ["c"]),  # stray closing tags
        ("<step></step><step> \n</step><step>a</step>", ["a"]),  # empty
        ("<step><step>a</step></step>", ["a"]),  # repeated
        ("<step>a</step></answer><step>b</step>", ["a"]),  # after the valid part
        ("<step>a</answer>b</step>", ["a"]),
        ("<STEP>a</STEP><step x>b</step>", []),  # only the exact tag
    ],
)
def test_odd_tags_have_the_documented_result(text, expected):
    assert contents(text) == expected


TAGS = ["<step>", "</step>", "</think>", "<think>", "<answer>", "</answer>"]
HEADERS = ["1. ", "\n2. x", "\nStep 1: ", "\n## Step 2", "Final answer: 3", "**"]
WORDS = [" ", "a", "b c", "\n", "\n\n", "😀"]
PIECES = st.lists(st.sampled_from(TAGS + HEADERS + WORDS), max_size=25).map("".join)


@given(PIECES)
def test_any_text_gives_ordered_disjoint_spans_that_hold_something(text):
    for splitter in (steps.tagged_steps, steps.numbered_steps, steps.blank_line_steps):
        spans = splitter(text)
        edges = [edge for span in spans for edge in span]
        assert edges == sorted(edges)
        assert all(0 <= a < b <= len(text) for a, b in spans)
        assert all(text[a:b] == text[a:b].strip() for a, b in spans)
        valid = text.partition("</answer>")[0]
        assert all(b <= len(valid) for _, b in spans)
    assert all(contents(text))


@given(PIECES)
def test_tagged_steps_against_a_walk_through_the_text(text):
    """The rule again, one character at a time."""
    expected, current, position = [], None, 0
    while position < len(text) and not text.startswith("</answer>", position):
        rest = text[position:]
        tag = re.match(r"<step>|</step>|</think>|<answer>", rest)
        if tag:
            if current is not None and current.strip():
                expected.append(current.strip())
            current = "" if tag.group() == "<step>" else None
            position += tag.end()
        else:
            current = None if current is None else current + text[position]
            position += 1
    if current is not None and current.strip():
        expected.append(current.strip())
    assert contents(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("intro\n1. a\n2. b\nmore\n\nFinal answer: 3", ["1. a", "2. b\nmore"]),
        ("1) a\n2) b", ["1) a", "2) b"]),
        ("Step 1: a\nStep 2: b\nTherefore, the final answer is 3", ["Step 1: a", "Step 2: b"]),
        ("**Step 1:** a\n**Step 2:** b", ["**Step 1:** a", "**Step 2:** b"]),
        ("## Step 1: T\na\n## Step 2\nb", ["## Step 1: T\na", "## Step 2\nb"]),
        # a numbered list inside a step is no step, and no other style either
        (
            "## Step 1: T\n1. x\n2. y\n## Step 2: U\nb",
            ["## Step 1: T\n1. x\n2. y", "## Step 2: U\nb"],
        ),
        ("1. a\n1. x\n2. b", ["1. a\n1. x", "2. b"]),
        # decimals, prose, and a second solution that starts again
        ("1. a\n2.5 is the value\n2. b\n1. again", ["1. a\n2.5 is the value", "2. b\n1. again"]),
        ("Step 1 shows that\nStep 1: a", ["Step 1: a"]),
        ("1. a\n3. c", ["1. a\n3. c"]),
        ("2. a\n3. b", []),
        ("1.\n2. b", ["2. b"]),
        ("1. a\n2. b <answer>3. c</answer>", ["1. a", "2. b"]),
        ("<think>1. a\n2. b</think>3. c", ["1. a", "2. b"]),
        ("10. a", []),
    ],
)
def test_numbered_steps(text, expected):
    assert contents(text, steps.numbered_steps) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n\nc", ["a\nb", "c"]),
        ("\n\n a \n \t\n\n b\n", ["a", "b"]),
        ("<think>a\n\nb</think>\n\n<answer>c</answer>", ["a", "b"]),
        ("a\n\n<answer>c</answer>", ["a"]),
        ("", []),
    ],
)
def test_blank_line_steps(text, expected):
    assert contents(text, steps.blank_line_steps) == expected


# --- spans -> tokens -----------------------------------------------------------------------------


@st.composite
def spans_and_offsets(draw):
    cuts = sorted(draw(st.lists(st.integers(0, 30), unique=True, max_size=8)))
    spans = list(zip(cuts[::2], cuts[1::2]))
    starts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12))
    offsets = [(s, s + draw(st.integers(0, 9))) for s in starts]
    return spans, np.array(offsets, np.int32)


@given(spans_and_offsets())
def test_step_ids_against_counting_characters(case):
    spans, offsets = case
    got = steps.step_ids_from_offsets(spans, offsets)
    for (start, end), step in zip(offsets.tolist(), got.tolist()):
        if start == end:
            expected = [k for k, (a, b) in enumerate(spans) if a < start < b]
            assert step == (expected[0] if expected else -1)
            continue
        counts = [sum(a <= c < b for c in range(start, end)) for a, b in spans]
        assert step == (counts.index(max(counts)) if any(counts) else -1)


def test_straddling_tokens_go_with_the_step_they_share_most_with():
    spans = [(2, 5), (5, 9)]
    offsets = np.array(
        [[0, 2], [1, 3], [3, 6], [4, 6], [4, 8], [8, 20], [9, 9], [0, 0], [5, 5], [6, 6]]
    )
    assert steps.step_ids_from_offsets(spans, offsets).tolist() == [
        -1, 0, 0, 0, 1, 1, -1, -1, -1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("spans", [[(3, 3)], [(5, 2)], [(0, 4), (3, 6)], [(5, 6), (0, 2)]])
def test_bad_spans_are_refused(spans):
    with pytest.raises(ValueError, match="in order and disjoint"):
        steps.step_ids_from_offsets(spans, np.zeros((1, 2), np.int32))


def test_step_ids_pads_rows_and_refuses_long_ones():
    offsets = [np.array([[0, 2], [2, 4]]), np.zeros((0, 2), np.int64), np.array([[0, 1]])]
    got = steps.step_ids([[(2, 4)], [(0, 1)], []], offsets, 4)
    assert got.tolist() == [[-1, 0, -1, -1], [-1] * 4, [-1] * 4]
    with pytest.raises(ValueError, match="row 0 has 2 tokens"):
        steps.step_ids([[], [], []], offsets, 1)
    with pytest.raises(ValueError, match="3 rows of offsets"):
        steps.step_ids([[]], offsets, 4)


# --- sampled ids -> offsets ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def word_level():
    words = [
        "[UNK]",
        "<eos>",
        "<step>",
        "</step>",
        "<think>",
        "</think>",
        "\\boxed{",
        "}",
        "7",
        "+5",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="[UNK]", pad_token="<eos>"
    )


@pytest.fixture(scope="module")
def byte_fallback():
    """As SentencePiece's: words with a mark for the space before them, bytes for all else."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁a", "▁b", "a", "▁"]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def byte_ids(tokenizer, text):
    """One token per UTF-8 byte: never what encoding gives, so offsets come from decoding."""
    names = {ord_: char for ord_, char in enumerate_bytes()}
    return [tokenizer.convert_tokens_to_ids(names[b]) for b in text.encode()]


def enumerate_bytes():
    """GPT-2's table from bytes to printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [(b, chr(b)) for b in printable] + [(b, chr(256 + n)) for n, b in enumerate(rest)]


def test_offsets_of_ids_that_encoding_gives_back(byte_level):
    text = "<step> First, 3 + 4 = 7.\n\n naïve 😀 café </step>"
    ids = byte_level.encode(text, add_special_tokens=False)
    got, offsets = steps.token_offsets(byte_level, ids)
    assert got == text
    assert_covers(text, offsets)
    by_decoding = steps._offsets_by_decoding(lambda i: byte_level.decode(list(i)), ids, text)
    trimmed = [steps._trim_unless_blank(text, a, b) for a, b in by_decoding]
    assert trimmed == [tuple(o) for o in offsets.tolist()]


def test_offsets_of_ids_that_encoding_does_not_give_back(byte_level):
    text = "<step> a naïve 😀 </step>"
    ids = byte_ids(byte_level, text)
    assert byte_level.encode(text, add_special_tokens=False) != ids
    got, offsets = steps.token_offsets(byte_level, ids)
    assert got == text
    expected = [(c, c + 1) for c, char in enumerate(text) for _ in char.encode()]
    assert [tuple(o) for o in offsets.tolist()] == expected  # every byte has its character's span


def test_bytes_that_never_become_a_character_are_given_a_span_too(byte_level):
    names = dict(enumerate_bytes())
    ids = byte_level.convert_tokens_to_ids([names[b] for b in b"a\xe2\x82b\xff\xff\xf0\x9f"])
    text, offsets = steps.token_offsets(byte_level, ids)
    assert text == "a\ufffdb\ufffd\ufffd\ufffd"
    assert offsets.tolist() == [[0, 1], [1, 2], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [5, 6]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_offsets_of_any_ids_follow_the_texts_of_their_prefixes(byte_level, data):
    ids = data.draw(st.lists(st.integers(0, len(byte_level) - 1), max_size=60))
    text, offsets = steps.token_offsets(byte_level, ids)
    assert text == byte_level.decode(ids)
    assert_covers(text, offsets)
    for i, (start, end) in enumerate(offsets.tolist()):
        before, after = byte_level.decode(ids[:i]), byte_level.decode(ids[: i + 1])
        if text.startswith(before) and text.startswith(after) and "\ufffd" not in after:
            added = text[len(before) : len(after)]
            assert text[start:end] == (added.strip() or added)
            assert len(before) <= start <= end <= len(after)


def test_words_joined_by_spaces(word_level):
    words = [
        "<think>",
        "<step>",
        "7",
        "+5",
        "</step>",
        "<step>",
        "7",
        "</step>",
        "</think>",
        "\\boxed{",
        "7",
        "}",
        "<eos>",
    ]
    ids = word_level.convert_tokens_to_ids(words)
    text, offsets = steps.token_offsets(word_level, ids)
    assert text == " ".join(words)
    assert [text[a:b] for a, b in offsets] == words
    got = steps.step_ids_from_offsets(steps.tagged_steps(text), offsets)
    assert got.tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1, -1, -1]
    by_decoding = steps._offsets_by_decoding(
        lambda i: word_level.decode(list(i)), ids * 9, " ".join(words * 9)
    )
    assert [" ".join(words * 9)[a:b].strip() for a, b in by_decoding] == words * 9


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_byte_fallback_never_fails_and_covers_the_text(byte_fallback, data):
    ids = data.draw(st.lists(st.integers(1, len(byte_fallback) - 1), max_size=50))
    text, offsets = steps.token_offsets(byte_fallback, ids)
    assert_covers(text, offsets)


def test_byte_fallback_gives_every_byte_its_character(byte_fallback):
    tokens = ["▁a", *(f"<0x{b:02X}>" for b in "😀é".encode()), "▁b"]
    text, offsets = steps.token_offsets(byte_fallback, byte_fallback.convert_tokens_to_ids(tokens))
    assert text == "a😀é b"
    assert offsets.tolist() == [[0, 1], *([[1, 2]] * 4), *([[2, 3]] * 2), [4, 5]]


def test_windows_do_not_cut_characters_in_two(byte_level):
    text = "a" + "😀é\n" * 60  # 4 + 2 + 1 bytes: every window length ends amid some character
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return byte_level.decode(list(ids))

    got = steps._offsets_by_decoding(decode, byte_ids(byte_level, text), text)
    assert got == [(c, c + 1) for c, char in enumerate(text) for _ in char.encode()]
    assert max(lengths) <= 2 * (steps._WINDOW + 4)  # so the work grows with T, not with T²


def test_a_decoder_that_rewrites_far_back_gets_whole_prefixes(byte_fallback):
    """One bad byte makes this decoder give up a run of any length, and rewrite all of it."""
    tokens = ["▁a", *(f"<0x{b:02X}>" for b in "😀".encode() * 12), "<0xFF>", "▁b"]
    ids = byte_fallback.convert_tokens_to_ids(tokens)
    text, offsets = steps.token_offsets(byte_fallback, ids)
    assert text == "a" + "\ufffd" * 49 + " b"
    assert_covers(text, offsets)
    assert offsets[0].tolist() == [0, 1]
    assert offsets[-1].tolist() == [51, 52]


def assert_covers(text, offsets):
    """Spans lie in the text, in order, and leave out nothing but white space."""
    covered = np.zeros(len(text), bool)
    last = 0
    for start, end in offsets.tolist():
        assert 0 <= start <= end <= len(text)
        assert start >= last or start == end
        last = max(last, start)
        covered[start:end] = True
    assert all(char.isspace() for char, hit in zip(text, covered) if not hit)


def test_every_token_of_a_block_and_no_other_has_its_id(byte_level):
    """From sampled ids to step ids: cut the text at the tokens and compare with the spans."""
    text = "<think><step>First 3+4=7</step><step>\n\nThen é</step>\n</think>\n<answer> \\boxed{7}"
    ids = byte_level.encode(text, add_special_tokens=False)
    got, offsets = steps.token_offsets(byte_level, ids)
    spans = steps.tagged_steps(got)
    row = steps.step_ids([spans], [offsets], len(ids) + 2)[0]
    for (start, end), step in zip(offsets.tolist(), row.tolist()):
        shared = {k for k, (a, b) in enumerate(spans) for c in range(start, end) if a <= c < b}
        assert (step in shared) if shared else step == -1
    assert row[-2:].tolist() == [-1, -1]
    assert set(row.tolist()) == {-1, 0, 1}
