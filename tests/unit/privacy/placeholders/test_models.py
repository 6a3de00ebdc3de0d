from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedsea.errors import ConfigError
from fedsea.privacy.placeholders.config import Placeholders
from fedsea.privacy.placeholders.models import PresidioDetector, SpacyDetector
from fedsea.privacy.placeholders.spans import Kind, Span

TEXT = "qwert asdf"


@pytest.fixture
def presidio(monkeypatch):
    """A module that behaves as presidio_analyzer does at the edge; returns what it was asked."""
    asked = []

    class AnalyzerEngine:
        def analyze(self, text, language, score_threshold):
            asked.append((text, language, score_threshold))
            return [
                SimpleNamespace(start=0, end=5, entity_type="PERSON", score=0.9),
                SimpleNamespace(start=6, end=10, entity_type="NRP", score=0.9),
            ]

    module: Any = ModuleType("presidio_analyzer")
    module.AnalyzerEngine = AnalyzerEngine
    monkeypatch.setitem(sys.modules, "presidio_analyzer", module)
    return asked


def pipeline(text):
    """What a spaCy pipeline does."""
    return SimpleNamespace(
        ents=[
            SimpleNamespace(start_char=0, end_char=5, label_="ORG"),
            SimpleNamespace(start_char=6, end_char=10, label_="CARDINAL"),
        ]
    )


def test_presidio_entities_become_kinds(presidio):
    """Known entities count, unknown ones do not, and the settings reach the engine."""
    detector = PresidioDetector(language="de", threshold=0.6)
    assert detector.find(TEXT) == [Span(0, 5, Kind.NAME)]
    assert presidio == [(TEXT, "de", 0.6)]


def test_a_model_joins_the_built_in_detectors(presidio):
    """What only the model knows is replaced as well."""
    substitution = Placeholders(kinds=["email"], detectors=[PresidioDetector()]).session()
    sent = substitution.substitute(TEXT)
    assert "qwert" not in sent
    assert substitution.restorer().restore(sent) == TEXT


def test_spacy_labels_become_kinds(monkeypatch):
    """A pipeline may be given, or named."""
    module: Any = ModuleType("spacy")
    module.load = {"xx_small": pipeline}.__getitem__
    monkeypatch.setitem(sys.modules, "spacy", module)
    for given in (pipeline, "xx_small"):
        assert SpacyDetector(given).find(TEXT) == [Span(0, 5, Kind.ORGANISATION)]


def test_a_pipeline_that_is_not_there(monkeypatch):
    """A wrong name is a line that says what to do."""

    def load(name):
        raise OSError(f"[E050] Can't find model {name!r}")

    module: Any = ModuleType("spacy")
    module.load = load
    monkeypatch.setitem(sys.modules, "spacy", module)
    with pytest.raises(ConfigError, match="no pipeline 'xx'"):
        SpacyDetector("xx")


@pytest.mark.parametrize(
    ("name", "make"),
    [("presidio_analyzer", PresidioDetector), ("spacy", lambda: SpacyDetector("en"))],
)
def test_what_is_not_installed(monkeypatch, name, make):
    """Absent packages are a configuration error."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="is not installed"):
        make()


def test_a_threshold_is_a_score(presidio):
    """Scores are from 0 to 1."""
    with pytest.raises(ConfigError, match="from 0 to 1"):
        PresidioDetector(threshold=40)


@pytest.mark.skipif(
    importlib.util.find_spec("presidio_analyzer") is None,
    reason="presidio-analyzer is not installed",
)
def test_the_real_analyzer():
    """The real engine answers as the fake one does."""
    found = PresidioDetector().find("Write to eva@clinic.org.")
    assert Span(9, 23, Kind.EMAIL) in found
