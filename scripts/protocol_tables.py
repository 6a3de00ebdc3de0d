"""Write the table and the picture of states in docs/protocol.md from the table that the code runs.

    python scripts/protocol_tables.py

A test compares the page with what this script would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedsea.wire.states import SENDERS, TRANSITIONS, State

PROTOCOL_PAGE = Path(__file__).resolve().parents[1] / "docs" / "protocol.md"
BEGIN = "<!-- states: written by scripts/protocol_tables.py -->"
END = "<!-- end of states -->"


def with_tables(text: str) -> str:
    """The page with the part between the markers made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{_picture()}\n\n{_table()}\n\n{END}{after}"


def _picture() -> str:
    lines = ["```text", f"start     --> {State.IDLE.value}"]
    for source, row in TRANSITIONS.items():
        for target in dict.fromkeys(row.values()):
            names = ", ".join(event.__name__ for event, end in row.items() if end is target)
            lines.append(f"{source.value:<9} --> {target.value:<9} {names}")
    lines.append(f"any       --> {State.FAILED.value:<9} a message of the peer was refused")
    return "\n".join([*lines, "```"])


def _table() -> str:
    states = [state for state in State if TRANSITIONS[state]]
    head = ["event", "sent by", *(f"in {state.value}" for state in states)]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in _rows(head, states)])


def _rows(head: list[str], states: list[State]) -> Iterator[list[str]]:
    yield head
    yield ["---"] * len(head)
    for event, sender in SENDERS.items():
        targets = [TRANSITIONS[state].get(event) for state in states]
        yield [
            event.__name__,
            sender.value,
            *("" if target is None else f"→ {target.value}" for target in targets),
        ]


if __name__ == "__main__":
    PROTOCOL_PAGE.write_text(
        with_tables(PROTOCOL_PAGE.read_text(encoding="utf-8")), encoding="utf-8"
    )
