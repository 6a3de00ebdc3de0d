"""Detectors that ask a trained model: Presidio or spaCy, where they are installed.

Neither is a dependency, and neither is imported before a detector is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedsea.errors import ConfigError
from fedsea.privacy.placeholders.spans import Kind, Span

PRESIDIO_KINDS: Mapping[str, str] = {
    "PERSON": Kind.NAME,
    "LOCATION": Kind.PLACE,
    "ORGANIZATION": Kind.ORGANISATION,
    "EMAIL_ADDRESS": Kind.EMAIL,
    "PHONE_NUMBER": Kind.PHONE,
    "CREDIT_CARD": Kind.CARD,
    "IBAN_CODE": Kind.IBAN,
    "IP_ADDRESS": Kind.IP,
    "URL": Kind.URL,
    "DATE_TIME": Kind.DATE,
    "US_SSN": Kind.NATIONAL_ID,
    "US_DRIVER_LICENSE": Kind.NUMBER,
    "US_PASSPORT": Kind.NUMBER,
    "US_BANK_NUMBER": Kind.NUMBER,
    "UK_NHS": Kind.NATIONAL_ID,
    "MEDICAL_LICENSE": Kind.NUMBER,
}
SPACY_KINDS: Mapping[str, str] = {
    "PERSON": Kind.NAME,
    "PER": Kind.NAME,
    "GPE": Kind.PLACE,
    "LOC": Kind.PLACE,
    "FAC": Kind.PLACE,
    "ORG": Kind.ORGANISATION,
    "DATE": Kind.DATE,
}


class PresidioDetector:
    """What an `AnalyzerEngine` of presidio-analyzer finds.

    Args:
        analyzer: an engine of your own; by default one with Presidio's own recognizers.
        language: of the texts.
        threshold: least score of a span, from 0 to 1.
        kinds: which of its entities count, and as what; others are left alone.

    Raises:
        ConfigError: presidio-analyzer is not installed, or the threshold is out of range.
    """

    def __init__(
        self,
        analyzer: Any = None,
        language: str = "en",
        threshold: float = 0.4,
        kinds: Mapping[str, str] = PRESIDIO_KINDS,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold is {threshold}; give a score from 0 to 1")
        if analyzer is None:
            analyzer = _module("presidio_analyzer", "presidio-analyzer").AnalyzerEngine()
        self._analyzer = analyzer
        self._language = language
        self._threshold = threshold
        self._kinds = kinds

    def find(self, text: str) -> Sequence[Span]:
        results = self._analyzer.analyze(
            text=text, language=self._language, score_threshold=self._threshold
        )
        return [
            Span(result.start, result.end, self._kinds[result.entity_type])
            for result in results
            if result.entity_type in self._kinds
        ]


class SpacyDetector:
    """The named entities of a spaCy pipeline.

    Args:
        pipeline: a loaded pipeline, or the name of an installed one, as "en_core_web_sm".
        kinds: which of its labels count, and as what; others are left alone.

    Raises:
        ConfigError: spaCy or the pipeline is not installed.
    """

    def __init__(self, pipeline: Any, kinds: Mapping[str, str] = SPACY_KINDS) -> None:
        if isinstance(pipeline, str):
            spacy, name = _module("spacy", "spacy"), pipeline
            try:
                pipeline = spacy.load(name)
            except OSError:
                raise ConfigError(
                    f"spaCy has no pipeline {name!r}: install it, or name another"
                ) from None
        self._pipeline = pipeline
        self._kinds = kinds

    def find(self, text: str) -> Sequence[Span]:
        return [
            Span(entity.start_char, entity.end_char, self._kinds[entity.label_])
            for entity in self._pipeline(text).ents
            if entity.label_ in self._kinds
        ]


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"{package} is not installed: install it, or use the built-in detectors"
        ) from None
