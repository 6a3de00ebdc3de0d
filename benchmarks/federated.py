"""Four owners of unequal shares of SST-2: together, with secure aggregation, against each alone.

    python -m benchmarks.federated [--assets ../shared/assets]

Four parts, in one run; training rows always go over mutual TLS to a server of the trunk:

1. *alone*: each owner trains on its own share; *together*: the same steps with averaging under
   SecAgg+, one owner lost in the middle of every third round. Loss and accuracy on sentences that
   nobody trained on.
2. *range*: how large updates are against the clip range, and how far the mean under SecAgg+ is from
   the mean in clear.
3. *resume*: a federation whose processes are killed (kill -9) half way and started again.
4. *network*: Flower's SuperLink behind the gate and four clients in processes of their own, under
   SecAgg+; all processes of one of them are killed (kill -9) after it trained and before it sent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from flwr.app import Message

from benchmarks.report import Circumstances, Clock, circumstances
from fedsea.client.examples import Example, read_examples
from fedsea.client.finetuning import FinetuneConfig
from fedsea.client.llm import load_tokenizer
from fedsea.client.trainable import trainable
from fedsea.federated.aggregator import Aggregator
from fedsea.federated.arrays import Arrays, largest, packed, unpacked
from fedsea.federated.client_app import client_app
from fedsea.federated.config import FederationConfig
from fedsea.federated.joining import ClientConfig, Joined
from fedsea.federated.local import FitSettings
from fedsea.federated.memory import MemoryGrid, new_context
from fedsea.federated.requests import Requests
from fedsea.federated.rounds import Federation, RoundReport
from fedsea.federated.simulation import TrunkProcess, with_trunk
from fedsea.model.adapters import TENSORS

SHARES = {"acme": 1200, "globex": 600, "initech": 300, "umbrella": 150}
LOST = "initech"
KILLED = "umbrella"
TESTED = 400
ROUNDS, RESUMED_ROUNDS, NETWORK_ROUNDS = 10, 4, 3
STEPS, BATCH, RATE = 10, 16, 3e-3
CLIP, MOST_EXAMPLES = 0.25, 1200.0
WORDS = {"0": " bad", "1": " good"}
RESULTS = Path(__file__).parent / "results"


def rows(file: Path) -> list[tuple[str, str]]:
    """Sentence and label of each line."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [(text.strip(), label) for text, label in (line.split("\t") for line in lines)]


def json_line(text: str, label: str) -> str:
    return json.dumps({"prompt": f"{text} It was", "completion": WORDS[label]})


def write_files(folder: Path, assets: Path, model: Path) -> None:
    """Shares that do not overlap, the test's two answers, and a file of settings for each owner."""
    lines = rows(assets / "data/sst2/train.tsv")
    random.Random(0).shuffle(lines)
    at = 0
    for name, count in SHARES.items():
        share = "\n".join(json_line(*line) for line in lines[at : at + count])
        (folder / f"{name}.jsonl").write_text(share, encoding="utf-8")
        at += count
    tested = rows(assets / "data/sst2/test.tsv")[:TESTED]
    right = "\n".join(json_line(*line) for line in tested)
    wrong = "\n".join(json_line(text, "1" if label == "0" else "0") for text, label in tested)
    (folder / "right.jsonl").write_text(right, encoding="utf-8")
    (folder / "wrong.jsonl").write_text(wrong, encoding="utf-8")
    for name in SHARES:
        (folder / f"{name}.toml").write_text(client_file(name, model), encoding="utf-8")


def client_file(name: str, model: Path, **more: str) -> str:
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    return f"""\
[client]
name = "{name}"
{keys}
[secure]
{secure_keys()}
[run]
model = "{model}"
data = "{name}.jsonl"
evaluation = "right.jsonl"
out = "out-{name}"

[parts]
bottom = 2
top = 2

[lora]
rank = 8
train = ["bottom", "top"]

[data]
end_of_text = false

[training]
steps = {STEPS}
batch_size = {BATCH}
learning_rate = {RATE}
schedule = "constant"
"""


def secure_keys() -> str:
    return f"enabled = true\nclip = {CLIP}\nmax_weight = {MOST_EXAMPLES}\ntimeout_s = 60.0\n"


def federation_file(folder: str, rounds: int, **aggregator: str) -> str:
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in aggregator.items())
    return f"""\
[federation]
name = "sst2"
clients = {json.dumps(list(SHARES))}
folder = "{folder}"
rounds = {rounds}
round_timeout_s = 120.0

[secure]
{secure_keys()}
{"[aggregator]" if keys else ""}
{keys}"""


class Judge:
    """Loss and accuracy on the test sentences of whatever a client's model is."""

    def __init__(self, joined: Joined, right: Sequence[Example], wrong: Sequence[Example]) -> None:
        self._split = trainable(joined.model)
        self._right, self._wrong = right, wrong

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        right, wrong = self._costs(self._right), self._costs(self._wrong)
        won = sum(one < other for one, other in zip(right, wrong, strict=True))
        tokens = sum(len(example.targets) for example in self._right)
        return {"loss": round(sum(right) / tokens, 4), "accuracy": round(won / len(right), 4)}

    def _costs(self, examples: Sequence[Example]) -> list[float]:
        found: list[float] = []
        for at in range(0, len(examples), 32):
            batch = examples[at : at + 32]
            chances = self._split.logits(batch).float().log_softmax(-1)
            targets = torch.tensor([target for example in batch for target in example.targets])
            each = -chances.gather(1, targets[:, None])[:, 0]
            parts = each.split([len(example.targets) for example in batch])
            found += [float(part.sum()) for part in parts]
        return found


def joined_clients(stack: ExitStack, folder: Path, trunk: TrunkProcess) -> dict[str, Joined]:
    return {
        name: stack.enter_context(
            Joined(with_trunk(ClientConfig.load(folder / f"{name}.toml"), trunk))
        )
        for name in SHARES
    }


def apps_of(joined: dict[str, Joined], folder: Path, secure: bool = True) -> dict[int, Any]:
    terms = ClientConfig.load(folder / "acme.toml").secure if secure else None
    return {
        node: client_app(Requests(one.client), terms)
        for node, one in enumerate(joined.values(), start=1)
    }


def alone_and_together(folder: Path, trunk: TrunkProcess) -> dict[str, Any]:
    """Parts 1 and 2."""
    with ExitStack() as stack:
        joined = joined_clients(stack, folder, trunk)
        first = joined["acme"]
        run = ClientConfig.load(folder / "acme.toml").finetune
        right, wrong = (
            _examples(first, folder / f"{name}.jsonl", run) for name in ("right", "wrong")
        )
        judges = {name: Judge(one, right, wrong) for name, one in joined.items()}
        start = first.training.arrays()
        found: dict[str, Any] = {"before": judges["acme"](), "alone": {}}
        for name, one in joined.items():
            one.training.load(start)
            courses = []
            for number in range(1, ROUNDS + 1):
                one.training.fit(FitSettings(round=number, layout=""))
                courses.append(judges[name]())
            best = min(course["loss"] for course in courses)
            found["alone"][name] = {"examples": SHARES[name], **courses[-1], "best_loss": best}
            print(name, found["alone"][name], flush=True)
            one.training.load(start)
        found["range"] = clip_range(joined, start, folder)
        reports: list[RoundReport] = []
        (folder / "together.toml").write_text(federation_file("together", ROUNDS))
        config = FederationConfig.load(folder / "together.toml")
        nodes = {name: node for node, name in enumerate(SHARES, start=1)}

        def reaches(node: int, message: Message) -> bool:
            lost = int(message.metadata.group_id or 0) % 3 == 2 and node == nodes[LOST]
            return not (lost and _asks_for_update(message))

        grid = MemoryGrid(apps_of(joined, folder), reaches)
        began = time.perf_counter()
        arrays = Federation(grid, new_context(0), config, reports.append, print).run()
        seconds = time.perf_counter() - began
        first.training.load(arrays)
        found["together"] = judges["acme"]()
        found["rounds"] = [
            {**asdict(report), "seconds": round(report.seconds, 2)} for report in reports
        ]
        found["seconds"] = round(seconds, 1)
        print("together", found["together"], flush=True)
        return found


def _asks_for_update(message: Message) -> bool:
    secure = message.content.config_records.get("secaggplus_configs")
    return secure is not None and secure.get("stage") == "collect_masked_vectors"


def clip_range(joined: dict[str, Joined], start: Arrays, folder: Path) -> dict[str, float]:
    """The first round's updates against the clip range, and the error of the masked mean."""
    means = []
    for name in ("clear", "masked"):
        secure = name == "masked"
        file = folder / f"{name}.toml"
        text = federation_file(name, 1).replace("[privacy]", "")
        file.write_text(text if secure else text.replace("enabled = true", "enabled = false"))
        for one in joined.values():
            one.training.load(start)
        grid = MemoryGrid(apps_of(joined, folder, secure))
        config = FederationConfig.load(file)
        means.append(Federation(grid, new_context(0), config, notice=print).run())
    for one in joined.values():
        one.training.load(start)
    updates = [{name: mean[name] - start[name] for name in start} for mean in means]
    error = {name: updates[1][name] - updates[0][name] for name in start}
    return {
        "clip": CLIP,
        "largest_of_the_mean": round(largest(updates[0]), 5),
        "largest_error": float(f"{largest(error):.3g}"),
    }


def _examples(joined: Joined, file: Path, run: FinetuneConfig) -> Sequence[Example]:
    tokenizer = load_tokenizer(joined.model.checkpoint)
    return read_examples(file, tokenizer, run.data.options).examples


def simulated(folder: Path, name: str, rounds: int, kill_after: int | None = None) -> bytes:
    """`fedsea federate simulate` as a process; its adapter, or nothing where it was killed."""
    file = folder / f"{name}.toml"
    file.write_text(federation_file(name, rounds))
    clients = [str(folder / f"{client}.toml") for client in SHARES]
    command = [sys.executable, "-m", "fedsea", "federate", "simulate", str(file), *clients]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    record = folder / name / "rounds.jsonl"
    while process.poll() is None:
        done = len(record.read_text().splitlines()) if record.exists() else 0
        if kill_after is not None and done >= kill_after:
            kill_family(process.pid)
            process.wait()
            return b""
        time.sleep(0.05)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return adapter_of(folder / name, rounds)


def resumed(folder: Path) -> dict[str, Any]:
    """Part 3."""
    whole = simulated(folder, "whole", RESUMED_ROUNDS)
    half = RESUMED_ROUNDS // 2
    simulated(folder, "stopped", RESUMED_ROUNDS, kill_after=half)
    again = simulated(folder, "stopped", RESUMED_ROUNDS)
    found = {"rounds": RESUMED_ROUNDS, "killed_after": half, "same_bits": whole == again}
    print("resume", found, flush=True)
    return found


def network(folder: Path, trunk: TrunkProcess) -> dict[str, Any]:
    """Part 4."""
    files = trunk.certificates
    settings = folder / "network.toml"
    settings.write_text(
        federation_file(
            "network",
            NETWORK_ROUNDS,
            address="127.0.0.1:0",
            ca=str(files / "ca.pem"),
            certificate=str(files / "server.pem"),
            key=str(files / "server.key"),
        )
    )
    reports: list[RoundReport] = []
    notices: list[str] = []
    aggregator = Aggregator(settings)
    clients = {}
    try:
        for name in SHARES:
            keys = {
                "aggregator": str(aggregator.address),
                "ca": str(files / "ca.pem"),
                "certificate": str(files / f"client-{name}.pem"),
                "key": str(files / f"client-{name}.key"),
            }
            model = Path(ClientConfig.load(folder / f"{name}.toml").finetune.run.model)
            text = client_file(name, model, **keys)
            text = text.replace("[secure]", f'servers = ["{trunk.address}"]\n[secure]', 1)
            file = folder / f"network-{name}.toml"
            file.write_text(text.replace('out = "out-', 'out = "net-'))
            command = [sys.executable, "-m", "fedsea", "federate", "client", str(file)]
            clients[name] = subprocess.Popen(
                command, env=environment(), stdout=subprocess.PIPE, text=True
            )
        killer = threading.Thread(target=_kill_when_trained, args=(clients[KILLED],), daemon=True)
        killer.start()
        began = time.perf_counter()
        aggregator.run(reports.append, notices.append)
        seconds = time.perf_counter() - began
    finally:
        aggregator.close()
        for client in clients.values():
            if client.poll() is None:
                client.send_signal(signal.SIGTERM)
                client.wait(60)
    return {
        "rounds": [{**asdict(report), "seconds": round(report.seconds, 1)} for report in reports],
        "seconds": round(seconds, 1),
        "notices": notices,
    }


def _kill_when_trained(client: subprocess.Popen[str]) -> None:
    """kill -9 once it has trained in round 2, before its update is masked and sent."""
    assert client.stdout is not None
    for line in client.stdout:
        if line.startswith("round 2"):
            kill_family(client.pid)
            return


def kill_family(pid: int) -> None:
    """kill -9 for a process and all that it started."""
    for child in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        child.kill()


def adapter_of(folder: Path, number: int) -> bytes:
    return packed(unpacked((folder / f"rounds/step-{number:08d}" / TENSORS).read_bytes()))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def page(found: dict[str, Any], about: Circumstances) -> Iterator[str]:
    """The same for people."""
    yield "# A federation of four on SST-2"
    yield ""
    yield (
        f"{about.date}, {about.hardware['processor']}, {about.hardware['cores']} cores, commit "
        f"{about.commit}; `{about.command}`; {about.seconds:.0f} s, other processes used "
        f"{about.others:.1f} cores."
    )
    yield ""
    yield (
        f"Model stories260K, cut 2 | 1 | 2, LoRA of rank 8 in bottom and top; {ROUNDS} rounds of "
        f"{STEPS} steps of {BATCH} sentences, AdamW at {RATE:g}. Rows go over mutual TLS to a server "
        f"of the trunk. Judged on {TESTED} sentences that nobody trained on: mean loss of the "
        "answer's tokens, and how often the right word is the likelier one (standard error "
        f"{(0.24 / TESTED) ** 0.5:.3f}). Alone means the same rounds on the own share only, with a "
        "fresh optimizer in each as in the federation."
    )
    yield ""
    yield "| who | examples | test loss | accuracy | least test loss of all rounds |"
    yield "|---|---|---|---|---|"
    yield f"| nobody (before training) | 0 | {_cells(found['before'])} | |"
    for name, one in found["alone"].items():
        best = f"{one['best_loss']:.4f}" if "best_loss" in one else "not measured"
        yield f"| {name} alone | {one['examples']} | {_cells(one)} | {best} |"
    total = sum(SHARES.values())
    yield f"| **all four, FedAvg with SecAgg+** | {total} | {_cells(found['together'])} | |"
    yield ""
    lost = sum(bool(report["missing"]) for report in found["rounds"])
    yield (
        f"In {lost} of the {ROUNDS} rounds {LOST} was lost after its keys were shared and before its "
        f"masked update came. All rounds together took {found['seconds']} s in one process."
    )
    yield ""
    span = found["range"]
    yield (
        f"Clip range {span['clip']}; the largest number of the first mean update is "
        f"{span['largest_of_the_mean']}; the mean under SecAgg+ differs from the mean in clear by at "
        f"most {span['largest_error']:g} in any number."
    )
    yield ""
    again = found["resume"]
    same = "the same bits" if again["same_bits"] else "other bits"
    yield (
        f"Killed (kill -9, all processes) after {again['killed_after']} of {again['rounds']} rounds "
        f"under SecAgg+ and started again, a federation ends with {same} as one that was not."
    )
    yield ""
    yield "Over Flower's network, behind the gate, with a process tree for each client, under SecAgg+:"
    yield ""
    yield "| round | finished | missing | seconds |"
    yield "|---|---|---|---|"
    for report in found["network"]["rounds"]:
        missing = ", ".join(report["missing"]) or "nobody"
        finished = ", ".join(report["clients"])
        yield f"| {report['round']} | {finished} | {missing} | {report['seconds']} |"
    yield ""
    yield (
        f"All processes of {KILLED} were killed (kill -9) in round 2 after it had trained. The "
        "seconds of that round hold the timeout of the exchanges (60 s)."
    )


def _cells(one: dict[str, float]) -> str:
    return f"{one['loss']:.4f} | {one['accuracy']:.3f}"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description="A federation of four on SST-2.")
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--skip-network", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    assets = options.assets.resolve()
    model = assets / "models/stories260K"
    place = Path(tempfile.mkdtemp(prefix="fedsea-federated-"))
    try:
        write_files(place, assets, model)
        trunk = TrunkProcess(str(model), place, list(SHARES))
        try:
            found = alone_and_together(place, trunk)
            found["resume"] = resumed(place)
            if not options.skip_network:
                found["network"] = network(place, trunk)
        finally:
            trunk.close()
    finally:
        shutil.rmtree(place)
    if options.skip_network:
        print(json.dumps(found, indent=2))
        return
    about = circumstances("python -m benchmarks.federated", clock)
    stem = RESULTS / f"{about.date[:10]}-federated"
    stem.with_suffix(".json").write_text(json.dumps({"about": asdict(about), **found}, indent=2))
    stem.with_suffix(".md").write_text("\n".join(page(found, about)) + "\n")


if __name__ == "__main__":
    main()
