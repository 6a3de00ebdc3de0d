"""Randomness of the mechanisms: a ChaCha20 keystream.

The guarantee of a mechanism is worth what its random numbers are worth: whoever can predict them
subtracts them. Numbers come from ChaCha20 (RFC 8439) under a key of the operating system, never
from torch's or numpy's generators. The key is replaced after every 4 GiB and in a forked process,
and is never shown. A seed may be given only by tests.
"""

from __future__ import annotations

import hashlib
import os
import threading

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy import special

from fedsea.errors import ConfigError

_BYTES_PER_KEY = 1 << 32

_BYTES_PER_BLOCK = 1 << 18  # what is drawn for counts at once stays in the cache
_MOST_TRIALS = 255

Bits = NDArray[np.uint8]
Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


class NoiseSource:
    """Independent random numbers for any number of threads.

    Args:
        seed: only in tests: the same seed gives the same numbers. Without it the key comes from
            the operating system.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        if seed is not None and not seed:
            raise ConfigError("an empty test seed; give at least one byte, or no seed at all")
        self._seed = seed
        self._keys = 0
        self._lock = threading.Lock()
        self._rekey()

    def __repr__(self) -> str:
        return "NoiseSource(test seed)" if self._seed else "NoiseSource()"

    def _rekey(self) -> None:
        if self._seed is None:
            key = os.urandom(32)
        else:
            key = hashlib.sha256(self._keys.to_bytes(8, "little") + self._seed).digest()
        self._keys += 1
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._left = _BYTES_PER_KEY
        self._process = os.getpid()

    def bits(self, count: int) -> bytes:
        """`count` random bytes; at most 4 GiB at once."""
        if count > _BYTES_PER_KEY:
            raise ConfigError(f"{count} random bytes at once; ask for fewer rows at a time")
        with self._lock:
            if self._left < count or self._process != os.getpid():
                self._rekey()
            self._left -= count
            return self._stream.update(bytes(count))

    def words(self, *shape: int) -> Words:
        """Random 64-bit words of the given shape."""
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self.bits(8 * count), dtype="<u8").reshape(shape)

    def uniform(self, *shape: int) -> Floats:
        """Multiples of 2^-53 strictly between 0 and 1, symmetric around 1/2.

        (k + 1/2) / 2^52 for uniform k of 52 bits, which float64 holds exactly.
        """
        numbers = (self.words(*shape) >> np.uint64(12)).astype(np.float64)
        return (numbers + 0.5) * 2.0**-52

    def normal(self, *shape: int) -> Floats:
        """Standard normal numbers, by the inverse of the distribution function.

        The tail ends at 8.2 standard deviations, which a true normal number exceeds with
        probability 2^-52.
        """
        return np.asarray(special.ndtri(self.uniform(*shape)), dtype=np.float64)

    def gamma(self, shape: float, count: int) -> Floats:
        """`count` numbers of the Gamma law of this shape and rate 1, by inversion."""
        if not shape > 0:
            raise ConfigError(f"a Gamma law of shape {shape}; the shape must be positive")
        return np.asarray(special.gammaincinv(shape, self.uniform(count)), dtype=np.float64)

    def bernoulli(self, chances: Floats) -> Bits:
        """1 with each chance, else 0; uint8 of the same shape. See `binomial`."""
        return self.binomial(1, chances)

    def binomial(self, trials: int, chances: Floats) -> Bits:
        """Binomial counts of at most 255 trials; uint8 of the shape of `chances`.

        The sum of `trials` comparisons of 64 random bits with the chance in units of 2^-64. The
        first eight bits decide all but one comparison in 256; only for those are the other 56
        drawn.
        """
        if not 1 <= trials <= _MOST_TRIALS:
            raise ConfigError(f"{trials} trials; a count in one byte holds 1 to {_MOST_TRIALS}")
        if not bool(np.all((chances >= 0) & (chances < 1))):
            raise ConfigError("a chance is not in [0, 1)")
        flat = chances.reshape(-1)
        counts = np.empty(flat.size, dtype=np.uint8)
        block = max(1, _BYTES_PER_BLOCK // trials)
        for start in range(0, flat.size, block):
            part = slice(start, start + block)
            counts[part] = self._counts(trials, flat[part])
        return counts.reshape(chances.shape)

    def _counts(self, trials: int, chances: Floats) -> Bits:
        scaled = np.ldexp(chances, 8)
        first = np.floor(scaled).astype(np.uint8)
        rest = np.ldexp(scaled - np.floor(scaled), 56).astype(np.uint64)
        drawn = np.frombuffer(self.bits(trials * chances.size), dtype=np.uint8)
        drawn = drawn.reshape(trials, chances.size)
        counts = np.add.reduce((drawn < first).view(np.uint8), axis=0, dtype=np.uint8)
        tied = np.flatnonzero(drawn == first) % chances.size
        won = (self.words(tied.size) >> np.uint64(8)) < rest[tied]
        counts += np.bincount(tied[won], minlength=chances.size).astype(np.uint8)
        return np.asarray(counts, dtype=np.uint8)
