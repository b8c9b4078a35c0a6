"""A small real tokenizer, made without a network."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "Yes", "No", "is", "it", "?", "!", "*"]
WORDS += ["Step", "1", ":", "2", "Correct", "Incorrect"]


@pytest.fixture(scope="session")
def tokenizer():
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
