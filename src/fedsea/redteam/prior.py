"""The attack that observes nothing: what every other rate has to be compared with."""

from __future__ import annotations

from fedsea.redteam.attack import TextGuess
from fedsea.redteam.language_model import LanguageModel


def prior_only(ids: tuple[int, ...], public_prefix: int, model: LanguageModel) -> TextGuess:
    """The model's first choice at each position of a text, given the true tokens before it.

    Where nothing stands before a position, the most frequent guess without context is unknown to
    the model and token 0 is said.
    """
    expected = model.expect(ids).argmax(dim=-1).tolist()
    return TextGuess((*ids[:public_prefix], *[0, *expected][public_prefix : len(ids)]))
