"""What a task asks, in the file's words and as text for a model, and how a part of it is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedsea.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Entry:
    """One question of a data set as its file has it.

    Attributes:
        fields: texts by the names that templates use.
        source: what it was asked about, a passage or a conversation; splits keep sources whole.
        group: the question; entries of one group are judged together.
        gold: labels or texts that are right; none when the file does not say.
        candidates: labels or texts to choose among; none when the answer is open.
        turns: questions asked before about the same source, with their answers, oldest first.
    """

    fields: Mapping[str, str] = field(repr=False)
    source: str
    group: str
    gold: tuple[str, ...] = field(default=(), repr=False)
    candidates: tuple[str, ...] = field(default=(), repr=False)
    turns: tuple[tuple[str, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer that a model can choose.

    Attributes:
        label: what metrics compare.
        words: how the answer is said; empty for "none of the others".
        text: what follows the prompt when this is the answer; empty with `words`.
    """

    label: str = field(repr=False)
    words: str = field(repr=False)
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt of a task.

    Attributes:
        prompt: text that the model is given; it does not end in white space.
        completion: text that a model learns to continue it with; empty when there is none, in
            splits without labels and where the right answer is that no choice fits.
        choices: answers to choose among; none when the answer is open.
        group: the question; some metrics count by question.
        source: the passage or conversation; splits keep sources whole.
        gold: labels or texts that are right; none when the file does not say.
    """

    prompt: str = field(repr=False)
    completion: str = field(repr=False)
    choices: tuple[Choice, ...] = field(default=(), repr=False)
    group: str = ""
    source: str = ""
    gold: tuple[str, ...] = field(default=(), repr=False)


def trainable(records: Iterable[Record]) -> list[Record]:
    """The records with a completion to learn."""
    return [record for record in records if record.completion]


def sampled(entries: Sequence[Entry], limit: int, seed: int) -> list[Entry]:
    """At most `limit` entries, drawn by the seed, groups whole, in the order of the file.

    Raises:
        ConfigError: no group is as small as the limit.
    """
    groups: dict[str, int] = {}
    for entry in entries:
        groups[entry.group] = groups.get(entry.group, 0) + 1
    room, taken = limit, set()
    for group in _shuffled(groups, seed):
        if groups[group] <= room:
            room -= groups[group]
            taken.add(group)
    if not taken:
        raise ConfigError(f"a limit of {limit} records holds no question whole; raise it")
    return [entry for entry in entries if entry.group in taken]


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Records for training and for evaluation; the latter are about `share` of the sources.

    Raises:
        ConfigError: the share is not between 0 and 1.
        DataError: there are too few sources for both.
    """
    if not 0 < share < 1:
        raise ConfigError(f"a share of {share:g} for evaluation leaves one side without records")
    sources = dict.fromkeys(record.source for record in records)
    count = max(1, round(share * len(sources)))
    if count >= len(sources):
        raise DataError(
            f"{len(sources)} passages or conversations cannot be split; give a file for evaluation"
        )
    kept_back = set(_shuffled(sources, seed)[:count])
    training = [record for record in records if record.source not in kept_back]
    return training, [record for record in records if record.source in kept_back]


def _shuffled(names: Iterable[str], seed: int) -> list[str]:
    order = list(names)
    random.Random(seed).shuffle(order)
    return order
