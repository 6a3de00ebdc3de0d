"""Mechanisms by name: the text of options, ledgers and reports made into values."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian, center_fingerprint, checked_clipping
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.quantization import StochasticQuantization, Ternary

PLAIN = "plain"


class _Options:
    """The key=value pairs of one spec; every key must be taken."""

    def __init__(self, name: str, text: str, center: Tensor | None, width: int | None) -> None:
        self._name = name
        self._width = width
        self._center = center
        self._pairs: dict[str, str] = {}
        self._known: list[str] = []
        for part in filter(None, text.split(",")):
            key, equals, value = part.partition("=")
            if not equals or not key or not value or key in self._pairs:
                raise ConfigError(f"mechanism {name}: {part!r} is not one key=value")
            self._pairs[key] = value

    def text(self, key: str, default: str) -> str:
        self._known.append(key)
        return self._pairs.pop(key, default)

    def number(self, key: str) -> float:
        value = self.optional(key)
        if value is None:
            near = get_close_matches(key, self._pairs, n=1)
            hint = f"; {near[0]} is not known" if near else ""
            raise ConfigError(f"mechanism {self._name} needs {key}=NUMBER{hint}")
        return value

    def optional(self, key: str) -> float | None:
        text = self.text(key, "")
        if not text:
            return None
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"mechanism {self._name}: {key}={text} is not a number") from None

    def whole(self, key: str) -> int:
        return _whole(key, self.number(key))

    def width(self) -> int | None:
        """The width that the spec names, or else the one of the rows at the cut."""
        return self._width if (named := self.optional("width")) is None else _whole("width", named)

    def known_width(self) -> int:
        width = self.width()
        if width is None:
            raise ConfigError(f"mechanism {self._name} needs width=NUMBER, the numbers in a row")
        return width

    def center(self) -> Tensor | None:
        """The given centre, which must be the one that the spec names, if it names one."""
        named = self.text("center", "")
        if not named:
            return self._center
        if self._center is None or center_fingerprint(self._center.double()) != named:
            raise ConfigError(
                f"mechanism {self._name} was made with the centre {named}; pass that centre"
            )
        return self._center

    def finish(self) -> None:
        if self._pairs:
            raise ConfigError(
                f"mechanism {self._name} knows no {min(self._pairs)!r}; "
                f"it knows {', '.join(self._known)}"
            )


def _whole(key: str, value: float) -> int:
    if not value.is_integer():
        raise ConfigError(f"{key}={value} is not a whole number")
    return int(value)


def _gaussian(options: _Options) -> Mechanism:
    clip_norm = options.number("clip_norm")
    mu, epsilon, delta = (options.optional(key) for key in ("mu", "epsilon", "delta"))
    by, center = checked_clipping(options.text("by", "row")), options.center()
    if mu is not None and epsilon is None and delta is None:
        return Gaussian(clip_norm, mu, by, center)
    if mu is None and epsilon is not None and delta is not None:
        return Gaussian.calibrated(epsilon, delta, clip_norm, by, center)
    raise ConfigError("mechanism gaussian needs either mu=NUMBER or both epsilon and delta")


def _fedsea(options: _Options) -> Mechanism:
    return FedSEAGaussian(options.number("scale"), options.optional("clip_norm"))


def _quantization(options: _Options) -> Mechanism:
    bits, clip, mu = options.whole("bits"), options.number("clip"), options.number("mu")
    return StochasticQuantization(bits, clip, mu, options.known_width())


def _ternary(options: _Options) -> Mechanism:
    clip, mu, sparsity = (options.number(key) for key in ("clip", "mu", "sparsity"))
    return Ternary(clip, mu, sparsity, options.known_width())


def _metric(options: _Options) -> Mechanism:
    return MetricDP(options.number("eta"), options.optional("clip_norm"), options.width())


_READERS: dict[str, Callable[[_Options], Mechanism]] = {
    Gaussian.name: _gaussian,
    FedSEAGaussian.name: _fedsea,
    StochasticQuantization.name: _quantization,
    Ternary.name: _ternary,
    MetricDP.name: _metric,
}


def mechanism_names() -> tuple[str, ...]:
    """Every name that a spec may start with, without `plain`."""
    return tuple(_READERS)


def mechanism_from_spec(
    text: str, center: Tensor | None = None, width: int | None = None
) -> Mechanism | None:
    """Read `name:key=value,...`; `plain` is no mechanism: None.

    Args:
        text: what `Mechanism.spec` wrote, or a person.
        center: the public centre, for mechanisms that take one.
        width: numbers in a row at the cut, for mechanisms that depend on it and whose spec does
            not name it.

    Raises:
        ConfigError: an unknown name, key or value.
    """
    name, _, rest = text.strip().partition(":")
    if name == PLAIN and not rest:
        return None
    reader = _READERS.get(name)
    if reader is None:
        raise ConfigError(f"no mechanism {name!r}; known: {', '.join((PLAIN, *_READERS))}")
    options = _Options(name, rest, center, width)
    mechanism = reader(options)
    options.finish()
    return mechanism
