"""The keystream and the laws drawn from it."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsea.errors import ConfigError
from fedsea.privacy.noise import NoiseSource

SEED = b"statistics"


def test_a_test_seed_repeats_and_no_seed_does_not():
    """The same seed gives the same bytes; without one every source has a key of its own."""
    assert NoiseSource(SEED).bits(64) == NoiseSource(SEED).bits(64)
    assert NoiseSource(b"other").bits(64) != NoiseSource(SEED).bits(64)
    assert NoiseSource().bits(64) != NoiseSource().bits(64)


def test_neither_seed_nor_key_is_shown():
    """A log of the object says nothing about its numbers."""
    assert repr(NoiseSource(SEED)) == "NoiseSource(test seed)"
    assert repr(NoiseSource()) == "NoiseSource()"


def test_the_stream_goes_on():
    """Two calls give what one call of their sum gives: nothing is repeated."""
    one, two = NoiseSource(SEED), NoiseSource(SEED)
    assert one.bits(10) + one.bits(22) == two.bits(32)


@pytest.mark.parametrize(
    ("draw", "law"),
    [
        (lambda noise: noise.uniform(20000), stats.uniform()),
        (lambda noise: noise.normal(20000), stats.norm()),
        (lambda noise: noise.gamma(0.7, 20000), stats.gamma(0.7)),
        (lambda noise: noise.gamma(1024, 20000), stats.gamma(1024)),
    ],
)
def test_continuous_laws(draw, law):
    """Kolmogorov-Smirnov finds no difference from the exact law in 20,000 numbers."""
    assert stats.kstest(draw(NoiseSource(SEED)), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("trials", [1, 15, 255])
@pytest.mark.parametrize("chance", [0.5, 1 / 256, 0.3, 0.999])
def test_binomial_law(trials, chance):
    """Counts have the exact law, also where a chance falls on a boundary of eight bits."""
    counts = NoiseSource(SEED).binomial(trials, np.full(20000, chance))
    expected = stats.binom(trials, chance).pmf(np.arange(trials + 1)) * 20000
    seen = np.bincount(counts, minlength=trials + 1)
    common = expected > 5
    rest = max(20000 - expected[common].sum(), 0.0)
    if rest > 1e-6:
        expected = np.append(expected[common], rest)
        seen = np.append(seen[common], 20000 - seen[common].sum())
    assert stats.chisquare(seen, expected * (seen.sum() / expected.sum())).pvalue > 1e-3


def test_binomial_counts_depend_on_their_own_chance():
    """Every element has its own chance; shape is kept; chance 0 never wins."""
    chances = np.array([[0.0, 0.9], [0.1, 0.0]]).repeat(5000, axis=0)
    counts = NoiseSource(SEED).binomial(10, chances)
    assert counts.shape == chances.shape
    assert counts.dtype == np.uint8
    assert (counts[chances == 0] == 0).all()
    assert counts[chances == 0.9].mean() == pytest.approx(9, abs=0.1)
    assert counts[chances == 0.1].mean() == pytest.approx(1, abs=0.1)


def test_small_bits_of_a_chance_count():
    """A chance below 1/256 is decided by the bits after the first eight."""
    counts = NoiseSource(SEED).bernoulli(np.full(200_000, 2.0**-12))
    assert counts.sum() == pytest.approx(200_000 / 4096, rel=0.5)


@pytest.mark.parametrize("chance", [-0.1, 1.0, float("nan")])
def test_a_chance_must_be_a_chance(chance):
    """What is no probability below 1 is refused."""
    with pytest.raises(ConfigError, match="chance"):
        NoiseSource(SEED).bernoulli(np.array([chance]))


@pytest.mark.parametrize("trials", [0, 256])
def test_counts_fit_a_byte(trials):
    """More trials than a byte can count are refused."""
    with pytest.raises(ConfigError, match="255"):
        NoiseSource(SEED).binomial(trials, np.array([0.5]))


def test_a_gamma_shape_must_be_positive():
    """There is no Gamma law of shape 0."""
    with pytest.raises(ConfigError, match="shape"):
        NoiseSource(SEED).gamma(0, 1)


def test_an_empty_seed_is_refused():
    """An empty seed is a mistake, not a wish for the system's randomness."""
    with pytest.raises(ConfigError, match="seed"):
        NoiseSource(b"")


@settings(max_examples=30)
@given(st.integers(1, 7), st.integers(1, 7))
def test_shapes(rows, width):
    """Numbers come in the shape that was asked for and strictly inside (0, 1)."""
    drawn = NoiseSource(SEED).uniform(rows, width)
    assert drawn.shape == (rows, width)
    assert (drawn > 0).all()
    assert (drawn < 1).all()


def test_threads_never_share_numbers():
    """Eight threads that draw at once get disjoint parts of one stream."""
    noise, words, lock = NoiseSource(SEED), [], threading.Lock()

    def draw() -> None:
        for _ in range(200):
            found = noise.words(16)
            with lock:
                words.extend(found.tolist())

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(words) == sorted(NoiseSource(SEED).words(8 * 200 * 16).tolist())


def test_a_forked_process_has_its_own_stream(monkeypatch):
    """After a fork, parent and child never give the same numbers."""
    noise = NoiseSource()
    monkeypatch.setattr(noise, "_stream", _Frozen())
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert noise.bits(8) != b"copied!!"


def test_a_key_serves_only_so_many_bytes(monkeypatch):
    """The key is replaced before its counter can run out, and the numbers go on."""
    monkeypatch.setattr("fedsea.privacy.noise._BYTES_PER_KEY", 64)
    noise = NoiseSource(SEED)
    drawn = [noise.bits(64) for _ in range(4)]
    assert len(set(drawn)) == 4


def test_more_than_one_key_gives_at_once(monkeypatch):
    """A request longer than a key serves is refused, not answered from a stream that wraps."""
    monkeypatch.setattr("fedsea.privacy.noise._BYTES_PER_KEY", 64)
    with pytest.raises(ConfigError, match="at once"):
        NoiseSource(SEED).bits(65)


class _Frozen:
    """The keystream of the parent."""

    def update(self, zeros: bytes) -> bytes:
        return b"copied!!"


def test_counts_of_many_blocks(monkeypatch):
    """Counts that are drawn block by block keep their places."""
    monkeypatch.setattr("fedsea.privacy.noise._BYTES_PER_BLOCK", 64)
    counts = NoiseSource(SEED).binomial(15, np.tile([0.0, 0.99], 101))
    assert (counts[::2] == 0).all()
    assert (counts[1::2] > 10).all()
