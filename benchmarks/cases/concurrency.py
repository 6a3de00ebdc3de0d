"""Several clients at once.

sessions    N callers on one `LLM`: N independent sessions on the wire of one organisation,
            whose own blocks are computed together
processes   N separate processes, each with its own copy of bottom, top and head, on the same
            cores as the server
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.bench import Bench
from benchmarks.cases.decode import make_prompts
from benchmarks.client_process import ClientProcess
from benchmarks.engines import Prompts, Split, Whole
from benchmarks.measure import Row, Spread, at_least, interleave, ratios
from benchmarks.settings import SHAPES, SMALL, TENANT
from fedsea.client.sessions import Session

CASE = "clients"
_FEW, _MANY = 4, 16


@dataclass(frozen=True, slots=True)
class _Rates:
    """Tokens per second of all clients together: decoding only, and with the prompts."""

    decode: float
    whole: float


def rows(bench: Bench) -> list[Row]:
    """4 clients against a batch of 4 in `transformers`, 16 clients against one."""
    found = []
    for shape in (SMALL,) if bench.scale.quick else SHAPES:
        found += _rows(bench, bench.model(shape), is_key=shape is SMALL)
    return found


def _rows(bench: Bench, model: Path, *, is_key: bool) -> list[Row]:
    whole, split = bench.whole(model), bench.split(model)
    prompts = make_prompts(model, _MANY, bench.scale.prompt)
    new = bench.scale.new_tokens
    bench.say(f"{_FEW} and {_MANY} sessions at once, {model.name}")

    def transformers() -> _Rates:
        run = whole.generate(prompts[:_FEW], new)
        return _Rates(run.rate, run.total_rate)

    rounds = interleave(
        [
            transformers,
            lambda: _sessions(split, prompts[:_FEW], new),
            lambda: _sessions(split, prompts[:1], new),
            lambda: _sessions(split, prompts, new),
        ],
        bench.scale.pairs,
    )
    batch, few, one, many = zip(*rounds, strict=True)
    found = []
    for kind, rate in _KINDS.items():
        is_main = rate is _decoding
        key = is_key and is_main
        found += [
            _row(f"{model.name}: 1 session, {kind}", map(rate, one)),
            _row(f"{model.name}: 4 sessions, {kind}", map(rate, few)),
            _row(f"{model.name}: 16 sessions, {kind}", map(rate, many)),
            Row(
                case=CASE,
                name=f"{model.name}: 4 sessions / transformers batch of 4, {kind}",
                spread=ratios(map(rate, few), map(rate, batch)),
                target=at_least(1.0) if is_main else None,
                key="clients4" if key else None,
            ),
            Row(
                case=CASE,
                name=f"{model.name}: 16 sessions / 1, {kind}",
                spread=ratios(map(rate, many), map(rate, one)),
                target=at_least(3.0) if is_main else None,
                key="clients16" if key else None,
            ),
        ]
    return found + _process_rows(bench, model, whole)


def _decoding(rates: _Rates) -> float:
    return rates.decode


def _with_prompts(rates: _Rates) -> float:
    return rates.whole


_KINDS = {"decoding": _decoding, "with prompts": _with_prompts}


def _sessions(split: Split, prompts: Prompts, new_tokens: int) -> _Rates:
    """All prompts first, then, from one moment on, all answers."""
    sessions = [Session.open(split.llm, len(prompt) + new_tokens) for prompt in prompts]
    try:
        began = time.perf_counter()
        _at_once(
            [
                partial(session.generate, prompt, max_new_tokens=1, ignore_eos=True)
                for session, prompt in zip(sessions, prompts, strict=True)
            ]
        )
        first = time.perf_counter()
        _at_once(
            [
                partial(session.generate, (), max_new_tokens=new_tokens - 1, ignore_eos=True)
                for session in sessions
            ]
        )
        ended = time.perf_counter()
    finally:
        for session in sessions:
            session.close()
    later = len(prompts) * (new_tokens - 1)
    return _Rates(later / (ended - first), (later + len(prompts)) / (ended - began))


def _at_once(works: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _process_rows(bench: Bench, model: Path, whole: Whole) -> list[Row]:
    served = bench.served(model)
    prompts = make_prompts(model, _FEW, bench.scale.prompt)
    new = bench.scale.new_tokens
    found = []
    with ExitStack() as stack:
        clients: list[ClientProcess] = []
        alone: tuple[float, ...] = ()
        for count in bench.scale.processes:
            bench.say(f"{count} client processes, {model.name}")
            clients += _start(bench, model, served.address, count - len(clients), stack)
            works: list[Callable[[], float]] = [
                lambda: whole.generate(prompts, new).rate,
                partial(_processes, clients, bench.scale.prompt, new),
            ]
            pairs = interleave(works, bench.scale.pairs)
            batch, rates = zip(*pairs, strict=True)
            if count == 1:
                alone = rates
            else:
                against = ("transformers batch of 4", batch) if count == _FEW else ("1", alone)
                found.append(
                    Row(
                        case=CASE,
                        name=f"{model.name}: {count} processes / {against[0]}, decoding",
                        spread=ratios(rates, against[1]),
                        note=_process_note(model, count),
                    )
                )
    return found


def _start(
    bench: Bench, model: Path, address: str, count: int, stack: ExitStack
) -> list[ClientProcess]:
    """Start processes at the same time, one thread each: they share the cores of this machine."""
    started = [
        ClientProcess(model, address, bench.certificates, TENANT, threads=1) for _ in range(count)
    ]
    for client in started:
        stack.callback(client.close)
    for client in started:
        client.wait()
    return started


def _processes(clients: Sequence[ClientProcess], prompt: int, new_tokens: int) -> float:
    """Tokens per second of all processes together, prompts not counted."""
    for command in (f"prefill {prompt}", f"decode {new_tokens}"):
        for client in clients:
            client.tell(command)
        answers = [client.wait() for client in clients]
    began = min(answer["began"] for answer in answers)
    ended = max(answer["ended"] for answer in answers)
    return len(clients) * new_tokens / float(ended - began)


def _process_note(model: Path, count: int) -> str:
    head = checkpoints.vocabulary_of(model) * checkpoints.hidden_of(model) * 4 / 1e6
    return (
        f"{count} private heads of {head:.0f} MB are read for every token over the memory bus "
        "that the server uses too; clients on machines of their own do not share it"
    )


def _row(name: str, rates: Iterable[float]) -> Row:
    return Row(case=CASE, name=name, unit="tok/s", spread=Spread.of(rates))
