"""The requests of a federation, as headers and arrays: written by the shim, read by the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedsea.errors import RemoteProtocolError
from fedsea.federated.arrays import Arrays, named
from fedsea.federated.local import FitSettings, LocalClient

Answer = tuple[dict[str, Any], Arrays]


class Requests:
    """Answers requests with a client.

    Args:
        client: computes.
        on_finish: called after the federation has ended, with the number of rounds.
        on_round: called after each round of local training, with its number and the factor by
            which the update was scaled to the clip range.
    """

    def __init__(
        self,
        client: LocalClient,
        on_finish: Callable[[int], None] = lambda _: None,
        on_round: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        self._client = client
        self._on_finish = on_finish
        self._on_round = on_round

    def __call__(self, header: dict[str, Any], arrays: Arrays) -> Answer:
        """Answer one.

        Raises:
            RemoteProtocolError: no such request, or a field of it is missing or of another type.
            FedseaError: what the client raises.
        """
        match header.get("request"):
            case "describe":
                return self._client.describe(), {}
            case "arrays":
                return {}, self._client.arrays()
            case "fit":
                return self._fit(header, arrays)
            case "evaluate":
                after, layout = whole(header, "round"), text(header, "layout")
                loss, examples = self._client.evaluate(self._named(arrays), layout, after)
                return {"loss": loss, "examples": examples}, {}
            case "finish":
                rounds = whole(header, "round")
                self._client.finish(self._named(arrays), text(header, "layout"), rounds)
                self._on_finish(rounds)
                return {}, {}
            case _:
                raise RemoteProtocolError("a request that is not known came; use equal versions")

    def _named(self, arrays: Arrays) -> Arrays:
        return named(self._client.shared(), [arrays[key] for key in sorted(arrays)])

    def _fit(self, header: Mapping[str, Any], arrays: Arrays) -> Answer:
        settings = FitSettings(
            round=whole(header, "round"),
            layout=text(header, "layout"),
            proximal=number(header, "proximal"),
            unit=truth(header, "unit"),
            weigh=truth(header, "weigh"),
        )
        if settings.round < 1 or settings.proximal < 0:
            raise RemoteProtocolError("a round below 1 or a negative proximal term came")
        made = self._client.fit(self._named(arrays), settings)
        self._on_round(settings.round, made.scaled)
        return {"weight": made.weight, "scaled": made.scaled}, made.update


def whole(header: Mapping[str, Any], key: str) -> int:
    """A whole number of a header, 0 or more."""
    found = header.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise RemoteProtocolError(f"'{key}' of a request is no whole number")
    return found


def number(header: Mapping[str, Any], key: str) -> float:
    """A finite number of a header."""
    found = header.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or found - found != 0:
        raise RemoteProtocolError(f"'{key}' of a request is no number")
    return float(found)


def truth(header: Mapping[str, Any], key: str) -> bool:
    """A truth value of a header."""
    found = header.get(key)
    if not isinstance(found, bool):
        raise RemoteProtocolError(f"'{key}' of a request is neither true nor false")
    return found


def text(header: Mapping[str, Any], key: str) -> str:
    """A text of a header."""
    found = header.get(key)
    if not isinstance(found, str):
        raise RemoteProtocolError(f"'{key}' of a request is no text")
    return found
