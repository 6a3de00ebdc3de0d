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
        """`count` random bytes."""
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
