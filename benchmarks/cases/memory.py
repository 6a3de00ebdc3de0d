"""Peak memory of the client of a 7B-shaped model, one block in front and one behind, bf16."""

from __future__ import annotations

import json

from benchmarks.bench import Bench
from benchmarks.big import sparse_llama
from benchmarks.client_memory import NEW_TOKENS, PROMPT
from benchmarks.measure import Row, Spread, at_most
from benchmarks.processes import Child

CASE = "memory"
_REPEATS = 3


def rows(bench: Bench) -> list[Row]:
    """The whole client process: imports, bottom, top, head, KV rows, a prompt and an answer."""
    model = sparse_llama(bench.folder)
    bench.say("memory of a client of a 7B-shaped model")
    runs = []
    for _ in range(_REPEATS):
        arguments = ["benchmarks.client_memory", str(model)]
        with Child(arguments, bench.logs / "client-memory.log") as child:
            runs.append(json.loads(child.line()))
    return [
        Row(
            case=CASE,
            name="7B-shaped, bottom = top = 1, bf16: peak memory of the client",
            unit="GB",
            spread=Spread.of(run["answered"] / 1e9 for run in runs),
            target=at_most(1.6),
            note=f"of it after the imports {runs[0]['imports'] / 1e9:.2f} GB, after loading "
            f"{runs[0]['loaded'] / 1e9:.2f} GB; prompt {PROMPT}, {NEW_TOKENS} new; weights are "
            "a sparse file",
        )
    ]
