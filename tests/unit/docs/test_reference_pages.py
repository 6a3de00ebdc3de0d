"""Pages that are written from the code say what the code says now."""

from __future__ import annotations

from types import ModuleType

import pytest
from scripts import api_reference, configuration_reference, finetuning_reference

import fedsea
from fedsea.server.config import ServerConfig


@pytest.mark.parametrize(
    "script",
    [api_reference, configuration_reference, finetuning_reference],
    ids=lambda script: script.PAGE.stem,
)
def test_the_page_is_up_to_date(script: ModuleType) -> None:
    """The page is what its script would write; run `python scripts/NAME.py` when it is not."""
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), (
        f"python {script.__name__.replace('.', '/')}.py"
    )


def test_every_section_of_the_configuration_has_a_heading() -> None:
    """A section of the TOML file can be found by its name."""
    page = configuration_reference.page()

    assert all(f"\n## {name}\n" in page for name in ServerConfig.__dataclass_fields__)


def test_every_public_name_has_a_heading() -> None:
    """Whatever `fedsea` exports is described."""
    page = api_reference.page()

    assert all(f"\n## {name}\n" in page for name in fedsea.__all__ if name != "__version__")
