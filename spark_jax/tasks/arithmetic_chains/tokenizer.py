"""The embedded world's tokenizer: one word, one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spark_jax.tasks.arithmetic_chains.world import EOS, PAD, VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer() -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer over `VOCABULARY`, ids in its order; words are split at white space.

    Text of single-spaced words comes back unchanged from ids. There is no unknown token: encoding a
    word that the world does not have raises.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(VOCABULARY)}))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
