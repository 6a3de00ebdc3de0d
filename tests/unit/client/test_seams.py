"""Where a prompt ends and a completion begins, in tokens."""

from __future__ import annotations

from tests.conftest import character_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsea.client.seams import encode_seam


def tokenizer_of(vocabulary: list[str], pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the matches of a pattern."""
    pieces = Tokenizer(
        models.WordLevel({token: at for at, token in enumerate(["<u>", *vocabulary])}, "<u>")
    )
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=pieces)


def test_the_rest_of_the_joined_tokens() -> None:
    """With one token for each character the seam is where the texts meet."""
    tokenizer = character_tokenizer()

    seam = encode_seam(tokenizer, "ab", [" c", " de"])

    assert tokenizer.decode(seam.prompt) == "ab"
    assert [tokenizer.decode(each) for each in seam.completions] == [" c", " de"]


def test_a_token_over_the_seam_is_cut_there() -> None:
    """The prompt is encoded as it is without the completion, which is what `generate` sees."""
    tokenizer = tokenizer_of(["a", "b", "ab", "c"], "ab|.")

    seam = encode_seam(tokenizer, "ca", ["bc", "c"])

    assert seam.prompt == (4, 1)
    assert seam.completions == ((2, 4), (4,))


def test_a_space_may_belong_to_the_word_before_it() -> None:
    """Then it is the prompt's, if it is so for every completion."""
    tokenizer = tokenizer_of(["was", "was ", " ", "bad", "good", "so "], "[a-z]+ ?| ")

    both = encode_seam(tokenizer, "so was", [" bad", " good"])
    one = encode_seam(tokenizer, "so was", [" bad", "good"])

    assert (both.prompt, both.completions) == ((6, 2), ((4,), (5,)))
    assert one.prompt == (6, 1)


def test_texts_are_not_printed() -> None:
    """Token ids stay out of logs."""
    assert repr(encode_seam(character_tokenizer(), "ab", [" c"])) == "Seam()"
