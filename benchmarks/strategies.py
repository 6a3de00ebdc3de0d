"""Training time of the strategies for a fixed amount of data, in the shape of FedSEA-LLaMA's table 7.

    python -m benchmarks.strategies --examples 48 --repeats 3

Unsplit training with peft, one client after another, joint batches, and sub-trunks; every client is a
process of its own and the server another. Each run does the same number of examples, batch 1, LoRA of
rank 8 on the attention, one block at either end. What two cores cannot show, sub-trunks for four and
eight clients with machines of their own, is computed from the measured phases of a step.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks import checkpoints
from benchmarks.measure import Spread, ratios
from benchmarks.processes import Child
from benchmarks.schedule import Phases, Strategy, simulated
from benchmarks.settings import HOST, SHAPES, THREADS, Shape
from benchmarks.training_client import WHOLE, Trained, TrainingProcess
from fedsea.transport.certificates import init_ca, issue_client, issue_server

RUN = "run"
AVERAGE_EVERY = 10
DEADLINE_S = 120
SIMULATED = (2, 4, 8)
_RESULTS = Path(__file__).resolve().parent / "results"
_WARM_UP = 1_000_000


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table."""

    strategy: Strategy | None
    clients: int

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.strategy is None:
            return "unsplit, peft"
        return f"{self.strategy.value}, {self.clients}"


SETTINGS = (
    Setting(None, 1),
    Setting(Strategy.SEQUENTIAL, 2),
    Setting(Strategy.SEQUENTIAL, 8),
    Setting(Strategy.CLIENT_BATCH, 2),
    Setting(Strategy.CLIENT_BATCH, 4),
    Setting(Strategy.CLIENT_BATCH, 8),
    Setting(Strategy.SERVER_HIERARCHICAL, 2),
)


class Stage:
    """Certificates and a model; servers and clients come and go with every run."""

    def __init__(self, model: Path, folder: Path, examples: int) -> None:
        self.model = model
        self.examples = examples
        self._folder = folder
        self._certificates = folder / "certificates"
        init_ca(self._certificates, force=True)
        issue_server(self._certificates, [HOST], force=True)
        for number in range(max(SIMULATED)):
            issue_client(self._certificates, _tenant(number), force=True)

    def seconds(self, setting: Setting) -> tuple[float, list[Trained]]:
        """Wall-clock seconds of one run, and what each client says of its time."""
        if setting.strategy is None:
            with self._client(0, WHOLE, "", THREADS) as whole:
                trained = _trained([whole], self.examples)
        elif setting.strategy is Strategy.SEQUENTIAL:
            with self._server(setting) as address:
                trained = self._one_after_another(setting, address)
                return sum(one.seconds for one in trained), trained
        else:
            with self._server(setting) as address, ExitStack() as stack:
                clients = [
                    stack.enter_context(self._client(number, RUN, address, 1))
                    for number in range(setting.clients)
                ]
                trained = _trained(clients, self.examples // setting.clients)
        return max(one.ended for one in trained) - min(one.began for one in trained), trained

    def _one_after_another(self, setting: Setting, address: str) -> list[Trained]:
        trained: list[Trained] = []
        share = self.examples // setting.clients
        for number in range(setting.clients):
            with self._client(number, RUN, address, THREADS) as client:
                trained += _trained([client], share, number * share)
        return trained

    def _client(self, number: int, name: str, address: str, threads: int) -> TrainingProcess:
        tenant = _tenant(number)
        return TrainingProcess(self.model, name, address, self._certificates, tenant, threads)

    @contextmanager
    def _server(self, setting: Setting) -> Iterator[str]:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            config = Path(folder) / "server.toml"
            config.write_text(self._settings(setting, Path(folder)), encoding="utf-8")
            arguments = ["fedsea", "serve", "--config", str(config)]
            with Child(arguments, self._folder / "server.log") as child:
                yield child.line().split()[-1]

    def _settings(self, setting: Setting, folder: Path) -> str:
        assert setting.strategy is not None
        workers = min(THREADS, setting.clients)
        one = setting.strategy is not Strategy.SERVER_HIERARCHICAL
        tenants = ", ".join(f'"{_tenant(number)}"' for number in range(setting.clients))
        own = self._certificates
        return f"""
[server]
model = "{self.model}"
address = "{HOST}:0"
span = "{checkpoints.partition_of(self.model).trunk_span(checkpoints.blocks_of(self.model))}"
drain_grace_s = 1
[kv]
rows = 1024
[security]
ca = "{own / "ca.pem"}"
certificate = "{own / "server.pem"}"
key = "{own / "server.key"}"
[log]
level = "warning"
[training]
folder = "{folder / "training"}"
workers = {1 if one else workers}
threads = {THREADS if one else 1}
[training.groups.{RUN}]
strategy = "{setting.strategy.value}"
tenants = [{tenants}]
deadline_s = {DEADLINE_S}
average_every = {AVERAGE_EVERY}
"""


def _trained(clients: Sequence[TrainingProcess], share: int, first: int = 0) -> list[Trained]:
    """Let all train their shares at the same time, one step each before the clock counts."""
    for client in clients:
        client.begin(_WARM_UP, 1)
    for client in clients:
        client.wait()
    for number, client in enumerate(clients):
        client.begin(first + number * share, share)
    return [client.wait() for client in clients]


def _tenant(number: int) -> str:
    return f"client-{number}"


def phases_of(trained: Sequence[Trained], steps: int) -> Phases:
    """The phases of one step of a client that had the server to itself.

    The waits for the trunk hold what travels as well. Its forward and its backward with the step are
    not told apart: only their sum counts where nothing is batched.
    """
    seconds = sum(one.seconds for one in trained) / steps
    served = sum(one.served for one in trained) / steps
    forward = sum(one.forward for one in trained) / steps
    middle = sum(one.middle for one in trained) / steps
    return Phases(
        bottom_forward=forward,
        top=middle,
        bottom_backward=seconds - served - forward - middle,
        trunk_forward=lambda _: served / 2,
        trunk_backward=lambda _: served / 2,
        travel=0.0,
    )


def measured(stage: Stage, repeats: int) -> tuple[dict[str, list[float]], list[Phases]]:
    """Seconds of all settings, interleaved, and the phases of a step in every repeat."""
    found: dict[str, list[float]] = {setting.name: [] for setting in SETTINGS}
    phases = []
    for repeat in range(repeats):
        for setting in SETTINGS:
            seconds, trained = stage.seconds(setting)
            print(f"{repeat + 1}/{repeats}  {setting.name}: {seconds:.1f} s", flush=True)
            found[setting.name].append(seconds)
            if setting == Setting(Strategy.SEQUENTIAL, 2):
                phases.append(phases_of(trained, stage.examples // 2 * 2))
    return found, phases


def simulations(phases: Sequence[Phases], examples: int) -> dict[str, list[float]]:
    """Seconds where every client and every sub-trunk has a machine like this one."""
    found: dict[str, list[float]] = {}
    for clients in SIMULATED:
        name = f"{Strategy.SERVER_HIERARCHICAL.value}, {clients}"
        found[name] = [
            simulated(
                Strategy.SERVER_HIERARCHICAL, one, clients, examples // clients,
                workers=clients, average_every=AVERAGE_EVERY,
            )
            for one in phases
        ]  # fmt: skip
    return found


def page(
    shape: Shape,
    examples: int,
    found: dict[str, list[float]],
    computed: dict[str, list[float]],
) -> str:
    """The table in Markdown."""
    one, eight = f"{Strategy.SEQUENTIAL.value}, 2", f"{Strategy.SEQUENTIAL.value}, 8"
    lines = [
        f"# Training time by strategy, {_today()}",
        "",
        f"`python -m benchmarks.strategies` on {_machine()}. A Llama of {shape.hidden} x "
        f"{shape.blocks} with random weights, one block at either end, LoRA of rank 8 on the attention, "
        f"fp32, batch 1, {examples} examples of 64 to 192 tokens in all. Median (least to greatest) of "
        f"{len(found[one])} interleaved runs.",
        "",
        "| strategy, clients | seconds | speed, sequential = 1 | speed, unsplit = 1 |",
        "|---|---:|---:|---:|",
    ]
    for name, seconds in found.items():
        base = found[eight] if name.endswith(" 8") else found[one]
        lines.append(_line(name, seconds, base, found[SETTINGS[0].name]))
    lines += [
        "",
        "Sequential runs are those of two clients, and of eight for settings of eight. All processes "
        "share the two cores: clients that train at the same time have one thread each, the server has "
        "two, sub-trunks one each.",
        "",
        "## Where every client and every sub-trunk has a machine like this one",
        "",
        f"Computed from the phases of a measured step (`benchmarks/schedule.py`), a mean every "
        f"{AVERAGE_EVERY} steps without a cost of its own.",
        "",
        "| strategy, clients | seconds | speed, sequential = 1 | speed, unsplit = 1 |",
        "|---|---:|---:|---:|",
    ]
    for name, seconds in computed.items():
        lines.append(_line(name, seconds, found[one], found[SETTINGS[0].name]))
    return "\n".join(lines) + "\n"


def _line(
    name: str, seconds: Sequence[float], sequential: Sequence[float], unsplit: Sequence[float]
) -> str:
    spread = Spread.of(seconds)
    return (
        f"| {name} | {spread.median:.1f} ({spread.low:.1f} to {spread.high:.1f}) | "
        f"{ratios(sequential, seconds).median:.2f} | {ratios(unsplit, seconds).median:.2f} |"
    )


def _today() -> str:
    return dt.datetime.now(dt.UTC).date().isoformat()


def _machine() -> str:
    cores = psutil.cpu_count()
    return f"{platform.processor() or platform.machine()}, {cores} cores, no GPU"


def main() -> None:
    """Measure and write a page beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="strategies", help="of the page, after the date")
    options = parser.parse_args()
    folder = checkpoints.prepare_folder(checkpoints.default_folder())
    shape = SHAPES[0]
    with tempfile.TemporaryDirectory(prefix="fedsea-strategies-") as own:
        stage = Stage(checkpoints.random_llama(folder, shape), Path(own), options.examples)
        found, phases = measured(stage, options.repeats)
    computed = simulations(phases, options.examples)
    path = _RESULTS / f"{_today()}-{options.name}"
    path.with_suffix(".md").write_text(
        page(shape, options.examples, found, computed), encoding="utf-8"
    )
    kept = {
        "machine": _machine(),
        "shape": asdict(shape),
        "examples": options.examples,
        "seconds": found,
        "computed": computed,
    }
    path.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
