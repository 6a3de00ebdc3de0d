"""Examples to fine-tune the demo model on: invented patients and where a clinic sends them.

    python -m scripts.demo_examples COUNT > triage.jsonl

Which colour and which room belong to a reason is a rule of this file and of no clinic. Line number
`index` is always the same, on every machine.
"""

from __future__ import annotations

import json
import sys

from scripts.demo_notes import MEN, SURNAMES, WOMEN, Draw

COLOURS = ("green", "yellow", "red")
REASONS = ("cough", "headache", "heartburn", "tiredness", "thirst", "poor sleep")

_SEED = 50311


def example(index: int) -> dict[str, str]:
    """A prompt and its completion."""
    draw = Draw(_SEED, index)
    reason = draw.one(REASONS)
    name = f"{draw.one(WOMEN + MEN)} {draw.one(SURNAMES)}"
    place = REASONS.index(reason)
    return {
        "prompt": f"Patient: {name}\nAge: {draw.number(18, 84)}\nReason: {reason}\nTriage:",
        "completion": f" {COLOURS[place % len(COLOURS)]}, room {1 + place}.",
    }


if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        print(json.dumps(example(number)))
