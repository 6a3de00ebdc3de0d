"""A client of a federation whose training can be computed by hand, also as a process of its own.

python -m tests.federated_steps NAME TARGET EXAMPLES ADDRESS CERTIFICATES FOLDER SECURE-AS-JSON

It says "training" when a round begins here. With 0 EXAMPLES it never ends one.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsea.federated.arrays import Arrays
from fedsea.federated.config import SecureSection
from fedsea.federated.local import FitSettings, LocalClient, Policy
from fedsea.federated.participant import Participant
from fedsea.transport.address import parse_address
from fedsea.transport.credentials import ClientTLS

STEM = "base_model.model.model.layers"
BOTTOM_A = f"{STEM}.0.self_attn.q_proj.lora_A.weight"
BOTTOM_B = f"{STEM}.0.self_attn.q_proj.lora_B.weight"
TOP_B = f"{STEM}.3.self_attn.q_proj.lora_B.weight"
LAYOUT = {BOTTOM_A: (2, 3), BOTTOM_B: (4, 2), TOP_B: (5,)}


class Steps:
    """Moves every number half of the way to a target, as often as it is told."""

    def __init__(self, target: float, examples: int, steps: int = 1) -> None:
        self.target = np.float32(target)
        self.examples = examples
        self.steps = steps
        self.rounds: list[int] = []
        self._arrays = {name: np.zeros(shape, np.float32) for name, shape in LAYOUT.items()}

    @property
    def description(self) -> Mapping[str, Any]:
        return {"peft_type": "LORA", "r": 2, "lora_alpha": 4}

    def arrays(self) -> Arrays:
        return {name: array.copy() for name, array in self._arrays.items()}

    def load(self, arrays: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            assert self._arrays[name].shape == array.shape
            self._arrays[name] = np.array(array, np.float32)

    def fit(self, settings: FitSettings) -> int:
        self.rounds.append(settings.round)
        if not self.examples:
            print("training", flush=True)
            threading.Event().wait()
        start = self.arrays()
        for _ in range(self.steps):
            for name, array in self._arrays.items():
                pull = settings.proximal * (start[name] - array)
                self._arrays[name] = (array + (self.target - array) / 2 + pull).astype(np.float32)
        return self.examples

    def evaluate(self) -> tuple[float, int]:
        away = [float(np.abs(self.target - array).mean()) for array in self._arrays.values()]
        return sum(away) / len(away), self.examples


def main() -> None:
    """Take part until the federation ends or SIGTERM comes."""
    name, target, examples, address, certificates, place, secure = sys.argv[1:]
    folder, section = Path(place), SecureSection(**json.loads(secure))
    policy = Policy(clip=section.clip if section.enabled else None)
    client = LocalClient(name, Steps(float(target), int(examples)), policy, folder)
    files = Path(certificates)
    tls = ClientTLS(files / "ca.pem", files / f"client-{name}.pem", files / f"client-{name}.key")

    def told(number: int, scaled: float) -> None:
        print(f"round {number}", flush=True)

    participant = Participant(client, parse_address(address), tls, section, folder, told)
    signal.signal(signal.SIGTERM, lambda *_: participant.stop())
    try:
        participant.run(lambda text: print(text, flush=True))
    finally:
        participant.close()


if __name__ == "__main__":
    main()
