"""Where a prompt ends and a completion begins, in tokens."""

from __future__ import annotations

from tests.conftest import character_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsea.client.pairs import encode_pair


def test_the_rest_of_the_joined_tokens() -> None:
    """With one token for each character the seam is where the texts meet."""
    tokenizer = character_tokenizer()

    pair = encode_pair(tokenizer, "ab", " c")

    assert tokenizer.decode(pair.prompt) == "ab"
    assert tokenizer.decode(pair.completion) == " c"


def test_a_token_over_the_seam_is_cut_there() -> None:
    """The prompt is encoded as it is without the completion, which is what `generate` sees."""
    vocabulary = {"<u>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}
    pieces = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<u>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)

    pair = encode_pair(tokenizer, "ca", "bc")

    assert (pair.prompt, pair.completion) == ((4, 1), (2, 4))


def test_texts_are_not_printed() -> None:
    """Token ids stay out of logs."""
    assert repr(encode_pair(character_tokenizer(), "ab", " c")) == "Pair()"
