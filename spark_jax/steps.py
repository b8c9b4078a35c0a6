"""Where the steps are: response text -> step spans -> token spans -> `step_ids[B, T]`.

A step is a half-open span of characters, `(start, end)`, of the response text. The span covers the
whole block, tags or header included, so that every token that writes the step carries its id;
`content_span` gives the part between the tags. Spans are in order and never overlap.

The reward model sees a response only up to its first closing answer tag (method page, section 3),
so no splitter looks past it: what is appended after the answer can never be counted as a step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

StepSpan = tuple[int, int]

STEP_OPEN, STEP_CLOSE = "<step>", "</step>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


# --- text -> spans -------------------------------------------------------------------------------


def tagged_steps(text: str) -> list[StepSpan]:
    """Spans of the `<step>…</step>` blocks, tags included (method page, section 3).

    A step begins at an opening tag and ends at whichever comes first: its closing tag (included),
    the next opening tag, `</think>`, `<answer>`, `</answer>` or the end of the text (none included,
    white space before it trimmed). So a mistake harms its neighbourhood only:

    - unclosed: the step ends where the next thing begins, and counts;
    - nested: `<step>a<step>b</step>c</step>` is two steps, a and b; c is outside;
    - stray closing tag: ignored;
    - empty (nothing but white space inside): no step, its tokens are outside any step. A repeated
      opening tag `<step><step>a</step>` is therefore one step.
    """
    spans: list[StepSpan] = []
    start: int | None = None
    for tag in _TAGS.finditer(text):
        if start is not None:
            end = tag.end() if tag.group() == STEP_CLOSE else tag.start()
            _append_step(text, start, end, spans)
            start = None
        if tag.group() == ANSWER_CLOSE:
            return spans
        if tag.group() == STEP_OPEN:
            start = tag.start()
    if start is not None:
        _append_step(text, start, len(text), spans)
    return spans


def numbered_steps(text: str) -> list[StepSpan]:
    """Spans of steps that begin at a numbered line, from its header to the next one's.

    A header is a line that begins (after at most three spaces, bold marks allowed) with
    `## Step 1`, `Step 1:` or `1.` / `1)`. The first of these three styles in which a step 1 exists
    is the style of the text, and a header counts only if it carries the next number: a numbered
    list inside a step, a decimal at the start of a line or a second solution that starts again at 1
    opens no step.
    The last step ends before a line that announces the final answer. A header with nothing after it
    is no step. Text before the first header is outside.
    """
    begin, end = _reasoning(text)
    body = text[begin:end]
    headers = next(filter(None, (_headers(style, body) for style in _HEADERS)), [])
    if not headers:
        return []
    final = _FINAL_ANSWER_LINE.search(body, headers[-1][1])
    starts = [start for start, _ in headers]
    ends = [*starts[1:], final.start() if final else len(body)]
    spans = []
    for (start, header_end), stop in zip(headers, ends):
        if body[header_end:stop].strip(" \t\r\n*:.#"):
            spans.append(_trim(text, begin + start, begin + stop))
    return spans


def blank_line_steps(text: str) -> list[StepSpan]:
    """Spans of the paragraphs of the reasoning: runs of lines that hold more than white space.

    The reasoning is the text between `<think>` and `</think>` where these are there, and in any
    case ends at the answer block.
    """
    position, end = _reasoning(text)
    spans: list[StepSpan] = []
    paragraph: int | None = None
    for line in [*text[position:end].split("\n"), ""]:
        if line.strip():
            paragraph = position if paragraph is None else paragraph
        elif paragraph is not None:
            spans.append(_trim(text, paragraph, min(position, end)))
            paragraph = None
        position += len(line) + 1
    return spans


def content_span(text: str, span: StepSpan) -> StepSpan:
    """The part of a step's span without its `<step>` tags and the white space around it."""
    start, end = span
    if text.startswith(STEP_OPEN, start, end):
        start += len(STEP_OPEN)
    if text.endswith(STEP_CLOSE, start, end):
        end -= len(STEP_CLOSE)
    return _trim(text, start, end)


def step_texts(text: str, spans: Sequence[StepSpan]) -> tuple[str, ...]:
    """The content of each step, tags removed; headers of numbered steps stay."""
    return tuple(text[slice(*content_span(text, span))] for span in spans)


# --- spans -> tokens -----------------------------------------------------------------------------


def step_ids_from_offsets(
    spans: Sequence[StepSpan], offsets: Int[np.ndarray, "T 2"]
) -> Int32[np.ndarray, "T"]:
    """The step (0..K-1) that each token belongs to, −1 outside any step.

    A token that straddles a boundary belongs to the step it shares most characters with, the
    earlier one if two share the same number; a token that shares only part of itself with a step
    and the rest with nothing belongs to that step. A token without characters (start == end)
    belongs to a step only strictly inside it, so special tokens that tokenizers put at (0, 0) are
    outside.

    Args:
        spans: half-open character spans, in order and disjoint, as the splitters above give them.
        offsets: half-open character span of each token, as `token_offsets` gives them.

    Raises ValueError for spans that are out of order, overlap or are empty.
    """
    edges = np.asarray(spans, np.int64).reshape(-1, 2)
    _require_ordered(edges)
    if not len(edges):
        return np.full(len(offsets), -1, np.int32)
    token_starts, token_ends = np.asarray(offsets, np.int64).T[:, :, None]
    step_starts, step_ends = edges.T[:, None, :]
    shared = np.minimum(token_ends, step_ends) - np.maximum(token_starts, step_starts)
    strictly_inside = (
        (token_starts == token_ends) & (step_starts < token_starts) & (token_ends < step_ends)
    )
    shared = np.where(strictly_inside, 1, shared)
    ids = shared.argmax(axis=1)
    return np.where(shared.max(axis=1) > 0, ids, -1).astype(np.int32)


def step_ids(
    spans: Sequence[Sequence[StepSpan]],
    offsets: Sequence[Int[np.ndarray, "_ 2"]],
    num_tokens: int,
) -> Int32[np.ndarray, "B T"]:
    """`step_ids_from_offsets` of a batch, padded with −1 to `num_tokens` = T tokens a row.

    A row's offsets may be shorter than its tokens (the end-of-sequence token has no text): what is
    beyond them is outside any step. Raises ValueError for a row with more than T tokens, or where
    the two batches differ in length.
    """
    if len(spans) != len(offsets):
        raise ValueError(f"step_ids: {len(spans)} rows of spans, {len(offsets)} rows of offsets")
    ids = np.full((len(spans), num_tokens), -1, np.int32)
    for row, (row_spans, row_offsets) in enumerate(zip(spans, offsets)):
        if len(row_offsets) > num_tokens:
            raise ValueError(
                f"step_ids: row {row} has {len(row_offsets)} tokens, more than num_tokens="
                f"{num_tokens}; raise num_tokens or cut the row"
            )
        ids[row, : len(row_offsets)] = step_ids_from_offsets(row_spans, row_offsets)
    return ids


# --- sampled ids -> offsets ----------------------------------------------------------------------


def token_offsets(tokenizer: Any, ids: Sequence[int]) -> tuple[str, Int32[np.ndarray, "T 2"]]:
    """The text of sampled ids and each token's half-open character span in it.

    `tokenizer` is a Hugging Face fast tokenizer: called on a text it gives `input_ids` and
    `offset_mapping`, and it has `decode`.

    Exact for the ids *as sampled*, which need not be the ids that encoding the text would give.
    Where encoding gives them back, the tokenizer's own offsets are used; where not, tokens are
    decoded one after another in a bounded window. Both give the same result:

    - white space around a token's characters is not part of its span, unless it has nothing else;
    - a token that holds only some bytes of a character has the span of that character, so several
      tokens may share a span;
    - a token without text has an empty span;
    - where a decoder rewrites what it wrote before (a clean-up option), the tokens that touch the
      rewritten characters share them.
    """
    ids = [int(i) for i in ids]
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) == ids:
        offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
    else:
        offsets = _offsets_by_decoding(
            lambda some: str(tokenizer.decode(list(some), skip_special_tokens=False)), ids, text
        )
    trimmed = [_trim_unless_blank(text, start, end) for start, end in offsets]
    return text, np.asarray(trimmed, np.int32).reshape(-1, 2)


# --- helpers -------------------------------------------------------------------------------------

_TAGS = re.compile("|".join((STEP_OPEN, STEP_CLOSE, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)))
_HEADERS = (
    re.compile(r"^ {0,3}#{1,6}[ \t]*(?:\*\*)?[Ss]tep[ \t]+(\d{1,4})\b", re.MULTILINE),
    re.compile(
        r"^ {0,3}(?:\*\*)?[Ss]tep[ \t]+(\d{1,4})(?:[.:)]|(?=\*\*)|(?=[ \t]*$))", re.MULTILINE
    ),
    re.compile(r"^ {0,3}(?:\*\*)?(\d{1,4})[.)](?=\s|\*\*|\Z)", re.MULTILINE),
)
_FINAL_ANSWER_LINE = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*)?(?:(?:so|thus|hence|therefore),?[ \t]+)?(?:the[ \t]+)?"
    r"(?:final[ \t]+answer\b|answer(?:[ \t]+is\b|[ \t]*:))",
    re.MULTILINE | re.IGNORECASE,
)
_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_WINDOW = 16  # tokens decoded together as context of the next one


def _append_step(text: str, start: int, end: int, spans: list[StepSpan]) -> None:
    inner_start, inner_end = content_span(text, (start, end))
    if inner_start < inner_end:
        spans.append(_trim(text, start, end))


def _trim(text: str, start: int, end: int) -> StepSpan:
    """The span without the white space at its ends; empty at `start` if there is nothing else."""
    piece = text[start:end]
    stripped = piece.strip()
    if not stripped:
        return start, start
    start += len(piece) - len(piece.lstrip())
    return start, start + len(stripped)


def _trim_unless_blank(text: str, start: int, end: int) -> StepSpan:
    trimmed = _trim(text, start, end)
    return trimmed if trimmed[0] < trimmed[1] else (start, end)


def _reasoning(text: str) -> StepSpan:
    """From after the first `<think>` (or the start) to the first tag that ends the reasoning."""
    ends = [text.find(tag) for tag in (THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)]
    end = min([e for e in ends if e >= 0], default=len(text))
    think = text.find(THINK_OPEN, 0, end)
    return (think + len(THINK_OPEN) if think >= 0 else 0), end


def _headers(style: re.Pattern[str], body: str) -> list[StepSpan]:
    """Spans of the headers of one style that carry the numbers 1, 2, 3, …, in order."""
    headers: list[StepSpan] = []
    for match in style.finditer(body):
        if int(match.group(1)) == len(headers) + 1:
            headers.append(match.span())
    return headers


def _require_ordered(edges: Int[np.ndarray, "K 2"]) -> None:
    if np.any(edges[:, 0] >= edges[:, 1]) or np.any(edges[1:, 0] < edges[:-1, 1]):
        raise ValueError(
            f"step spans must be non-empty, in order and disjoint, got {edges.tolist()}"
        )


def _offsets_by_decoding(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str
) -> list[StepSpan]:
    """Offsets from the texts of ever longer prefixes of `ids`.

    Token i begins where the text of the tokens before it stops agreeing with `text`, and ends where
    its own prefix does. A prefix that ends amid a character ends in replacement characters instead;
    its last token then reaches into that character, and the next one begins in it.
    """
    prefixes = list(_prefix_texts(decode, ids, _WINDOW))
    if prefixes and prefixes[-1][0] + prefixes[-1][1] != text:
        # This decoder looks further back than a window; whole prefixes are exact by definition.
        prefixes = list(_prefix_texts(decode, ids, len(ids)))
    offsets: list[StepSpan] = []
    start = 0
    for before, added in prefixes:
        position = len(before)
        common = position + _common_length(added, text[position : position + len(added)])
        complete = common == position + len(added)
        common = max(common, start)
        end = common if complete else min(common + 1, len(text))
        if start == end and complete and added.endswith(_REPLACEMENT):
            offsets.append((end - 1, end))  # one more byte of a character that never came
        else:
            offsets.append((start, end))
        start = common
    return offsets


def _prefix_texts(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], window: int
) -> Iterator[tuple[str, str]]:
    """For every prefix of `ids` its text, in two parts: (up to some earlier token, from there on).

    The text that a token adds depends on few tokens before it (joining spaces, bytes of one
    character). So only the text of ids[context:i] is decoded, and what ids[context:base] gives
    taken off; every `window` tokens context and base move on, where the text holds no unfinished
    character.
    """
    context, base, base_text, before = 0, 0, "", ""
    for i in range(1, len(ids) + 1):
        added = decode(ids[context:i])[len(base_text) :]
        yield before, added
        if i - base >= window and not added.endswith(_REPLACEMENT):
            context, base, before = base, i, before + added
            base_text = decode(ids[context:base])


def _common_length(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    if a == b:
        return len(a)
    for position, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return position
    return min(len(a), len(b))
