"""Tokenizers and chat templates: the Hugging Face API, whatever file they come from."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spark_jax.data.formats import TextFormat

logger = logging.getLogger(__name__)

# How byte-level BPE cuts text before it merges, by `tokenizer.ggml.pre` of a GGUF file.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}
_CONTROL = 3  # token_type of special tokens; 4 is user-defined
_USER_DEFINED = 4


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How a prompt becomes what the model is shown.

    Attributes:
        template: "auto" renders the prompt as a user's turn with the tokenizer's own chat template
            where it has one, "always" refuses a tokenizer without one, "never" leaves prompts as
            they stand, as base models want them.
        system: the system's turn; None leaves it out (some templates then put their own).
        arguments: more arguments of the template, such as Qwen3's `enable_thinking`.
    """

    template: str = "auto"
    system: str | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.template not in ("auto", "always", "never"):
            raise ValueError(f"chat.template={self.template!r}; choose auto, always or never")
        if self.template == "never" and (self.system is not None or self.arguments):
            raise ValueError(
                "chat.system and chat.arguments need a chat template, but chat.template='never'; "
                "write what the model shall see into the prompt files"
            )


def load(path: str | Path) -> Any:
    """The tokenizer of a checkpoint directory or of a GGUF file.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: a GGUF file's tokenizer is of a kind that is not read here, or no end token.
    """
    path = Path(path)
    tokenizer = _from_gguf(path) if path.suffix == ".gguf" else _from_directory(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end token (eos_token); set one and save it")
    if tokenizer.pad_token_id is None:  # masks say what counts, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_ids(path: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end token, those of the checkpoint's
    `generation_config.json` (chat models end a turn with another token than a text), and the one
    that closes a turn in the chat template (which Qwen's base models have, but do not list)."""
    file = Path(path) / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *listed, *_turn_end(tokenizer))))


def render(tokenizer: Any, prompt: str, options: ChatOptions) -> str:
    """What the model is shown for a prompt, special tokens included: encode it as it stands.

    Without a chat template that is the prompt, after the token that the tokenizer begins texts with
    where it does (Llama's base models).

    In a template the prompt is one turn, whatever it holds: see `without_special_tokens`.

    Raises:
        ValueError: `template="always"` and there is none; a system turn or template arguments, and
            no template to put them in.
    """
    if options.template == "never" or tokenizer.chat_template is None:
        if options.template == "always" or options.system is not None or options.arguments:
            raise ValueError(
                f"chat={options} needs a chat template, and the tokenizer of "
                f"{tokenizer.name_or_path!r} has none; set chat.template to 'never'"
            )
        return _first_token(tokenizer) + prompt
    turns = [{"role": "user", "content": without_special_tokens(tokenizer, prompt)}]
    if options.system is not None:
        turns.insert(0, {"role": "system", "content": options.system})
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, **options.arguments
    )


def without_special_tokens(tokenizer: Any, text: str) -> str:
    """The text with a space inside each special token, so that it is read as plain characters.

    Prompts quote what a policy wrote. A policy that is rewarded for a reward model's verdict would
    soon find that `<|im_end|>` in a step lets it write that verdict itself. Counted in the log.
    """
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    found = 0
    for token in sorted(special, key=len, reverse=True):
        if len(token) > 1 and token in text:
            found += text.count(token)
            text = text.replace(token, f"{token[0]} {token[1:]}")
    if found:
        logger.warning("a prompt quoted %d special tokens; they are shown as plain text", found)
    return text


def chat_format(text_format: TextFormat, tokenizer: Any, options: ChatOptions) -> TextFormat:
    """The format with every prompt rendered for one model: stages encode prompts as they stand."""

    def shown(make: Callable[..., str]) -> Callable[..., str]:
        return lambda *arguments: render(tokenizer, make(*arguments), options)

    return dataclasses.replace(
        text_format,
        solve_prompt=shown(text_format.solve_prompt),
        verify_prompt=shown(text_format.verify_prompt),
        critique_prompt=shown(text_format.critique_prompt),
        merge_prompt=shown(text_format.merge_prompt),
        reward_prompt=shown(text_format.reward_prompt),
    )


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def _from_directory(path: Path) -> Any:
    """`tokenizer.json` as it stands, where there is one: the class that transformers picks by the
    model's type may cut text its own way or add tokens that the model does not have."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (path / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(path)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{path} holds none of {_TOKENIZER_FILES}: no tokenizer")
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _turn_end(tokenizer: Any) -> list[int]:
    """The special token that the chat template writes after an answer; [] where it writes none."""
    if tokenizer.chat_template is None:
        return []
    turns = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "answer"}]
    _, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1]
    special = tokenizer.added_tokens_decoder
    return [i for i in ids if i in special and special[i].special]


def _first_token(tokenizer: Any) -> str:
    """The text of the token that the tokenizer puts before every text; "" where it puts none."""
    begins_with = tokenizer("")["input_ids"][:1]
    starts = bool(begins_with) and begins_with[0] == tokenizer.bos_token_id
    return tokenizer.bos_token if starts else ""


def _from_gguf(path: Path) -> Any:
    """A fast tokenizer from a GGUF file's metadata: byte-level BPE, cut as the model was trained.

    transformers' own import of a GGUF tokenizer needs torch and forgets SmolLM2's cut.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    from spark_jax.models import gguf

    fields = gguf.metadata(path)
    if fields.get("tokenizer.ggml.model") != "gpt2":
        raise ValueError(
            f"{path}: tokenizer.ggml.model={fields.get('tokenizer.ggml.model')!r} is not read, "
            "only byte-level BPE ('gpt2') is; load a directory with the model's tokenizer.json"
        )
    words, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    cut = fields.get("tokenizer.ggml.pre")
    llama3 = cut == "llama-bpe"  # some of its words are not reached by merges
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    backend.pre_tokenizer = _pre_tokenizer(path, cut)
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [word for word, type_ in zip(words, types, strict=True) if type_ == kind]
        added = [AddedToken(word, special=special, normalized=False) for word in found]
        (backend.add_special_tokens if special else backend.add_tokens)(added)

    def word(name: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else words[index]

    first = word("bos")  # llama.cpp's defaults where the file does not say
    if first is not None and fields.get("tokenizer.ggml.add_bos_token", llama3):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=word("bos"),
        eos_token=word("eos"),
        unk_token=word("unknown"),
        pad_token=word("padding"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _pre_tokenizer(path: Path, name: str | None) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if name == "smollm":  # digits one by one, then GPT-2's cut
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if name not in _CUTS:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre={name!r} is not known, only {['smollm', *_CUTS]}; load a "
            "directory with the model's tokenizer.json"
        )
    cut = pre_tokenizers.Split(Regex(_CUTS[name]), behavior="isolated")
    return pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
