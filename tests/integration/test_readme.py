"""The README, run from top to bottom: what a new reader types works and shows what it promises."""

from __future__ import annotations

import pytest
from tests.documents import ROOT, Ran, Workplace, blocks

README = ROOT / "README.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[Ran]:
    """Everything that the README shows, after it was run."""
    with Workplace(tmp_path_factory.mktemp("readme")) as workplace:
        return workplace.run_page(README)


def output_of(ran: list[Ran], start: str) -> Ran:
    """What the only command that begins like this wrote."""
    (found,) = [entry for entry in ran if entry.command.startswith(start)]
    return found


@pytest.mark.slow
def test_commands_generate_and_chat(ran: list[Ran]) -> None:
    """Certificates, a server process, one prompt and one turn of a chat, as the README writes them."""
    generated = output_of(ran, "fedsea generate")

    assert "certs/server.key -> the server only" in output_of(ran, "fedsea certs").notes
    assert len(generated.output.split()) > 20
    assert "tokens/s" in generated.notes
    assert "messages up" in generated.notes
    assert output_of(ran, "fedsea chat").output.strip()


@pytest.mark.slow
def test_python_example_prints_what_the_command_prints(ran: list[Ran]) -> None:
    """The example streams the same greedy text, with another partition of the same model."""
    example = output_of(ran, "python").output

    assert len(example.split()) > 10
    assert output_of(ran, "fedsea generate").output.startswith(example)


def test_python_example_is_short() -> None:
    """The example has eight lines, blank ones included."""
    (example,) = [block for block in blocks(README) if block.language == "python"]

    assert len(example.code.splitlines()) == 8
