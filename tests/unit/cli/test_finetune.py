"""`fedsea finetune` in this process: what it refuses, what it shows, what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.training_trunk import TinyTrainingTrunk

from fedsea.cli import screen
from fedsea.cli.options import ConnectionOptions
from fedsea.cli.training_display import TrainingDisplay
from fedsea.client.trainer import StepReport
from fedsea.model.partition import Partition
from fedsea.model.spans import Placement
from fedsea.transport.memory import MemoryChannel

SHORT = ("--steps", 3, "--batch-size", 2, "--learning-rate", 0.01)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten pairs."""
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"A{n} IS", "completion": f" B{n}"}) for n in range(10)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def server(tiny_model, monkeypatch) -> TinyTrainingTrunk:
    """What the command connects to, in this process."""
    made = TinyTrainingTrunk(tiny_model, Partition(1, 1), Placement())
    channels = {"memory": lambda: MemoryChannel(made)}
    monkeypatch.setattr(ConnectionOptions, "addresses", property(lambda _: channels))
    return made


@pytest.fixture
def finetune(fedsea, server, tiny_model, data, tmp_path) -> Any:
    """Run the command on the pairs."""

    def run(*more: object, out: str = "run") -> Any:
        return fedsea(
            "finetune", data, "--model", tiny_model, "--out", tmp_path / out, "--plaintext",
            *SHORT, *more,
        )  # fmt: skip

    return run


def test_a_run(finetune, tmp_path, tiny_model):
    """The adapter, the metrics and the checkpoints are in the folder; the command is shown."""
    done = finetune("--evaluation-share", 0.2)
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} == {
        "adapter", "checkpoints", "evaluations.csv", "metrics.csv", "run.json", "summary.json",
    }  # fmt: skip
    assert {path.name for path in (out / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert len((out / "metrics.csv").read_text().splitlines()) == 4
    assert "8 examples" in done.stderr
    assert "2 examples to evaluate on" in done.stderr
    assert "3 of 3" in done.stdout
    command = done.stdout.splitlines()[-1]
    assert command.startswith(f"fedsea generate {tiny_model} PROMPT --bottom 1 --top 1")
    assert f"--adapter {out / 'adapter'} --trunk-adapter run" in command
    assert command.endswith("--plaintext")


def test_says_what_is_not_protected(finetune):
    """Without a mechanism one line says what the server can read."""
    assert "no mechanism" in finetune().stderr


def test_json(finetune):
    """One object, and nothing of the figures on standard error."""
    done = finetune("--json")
    found = json.loads(done.stdout)
    assert found["step"] == 3
    assert found["trunk_adapter"] == "run"
    assert "loss" not in done.stderr


def test_an_ended_run(finetune, server):
    """Giving the command again does nothing, and shows the same."""
    first = finetune()
    again = finetune()
    assert again.exit_code == 0
    assert "has ended already" in again.stderr
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert server.optimizer is not None
    assert server.optimizer.steps == 3


def test_another_run_is_refused(finetune):
    """Other settings do not go on with a folder's run; --no-resume refuses every run."""
    finetune()
    done = finetune("--seed", 3)
    assert done.exit_code == 2
    assert "holds a run with" in done.stderr
    done = finetune("--no-resume")
    assert done.exit_code == 2
    assert "leave --no-resume out" in done.stderr


def test_options_come_before_the_file(fedsea, server, tiny_model, data, tmp_path):
    """The file says what options do not; its paths are relative to it."""
    config = tmp_path / "run.toml"
    config.write_text(
        f'[run]\nmodel = "{tiny_model}"\ndata = "pairs.jsonl"\nout = "from-file"\n'
        '[lora]\nrank = 2\ntargets = ["q_proj"]\ntrain = ["bottom", "top"]\n'
        "[training]\nsteps = 50\nbatch_size = 2\n"
    )
    done = fedsea(
        "finetune", "--config", config, "--plaintext", "--steps", 2, "--set", "lora.rank=3"
    )
    assert done.exit_code == 0, done.stderr
    described = json.loads((tmp_path / "from-file" / "run.json").read_text())
    assert described["training"]["steps"] == 2
    assert described["model"]["lora"]["rank"] == 3
    assert described["model"]["lora"]["targets"] == ["q_proj"]
    assert "--trunk-adapter" not in done.stdout
    assert server.adapter is None


def test_what_does_not_fit_is_said(finetune):
    """Examples that were left out or cut are counted."""
    done = finetune("--max-tokens", 5)
    assert done.exit_code == 2
    assert "raise max_tokens" in done.stderr
    done = finetune("--max-tokens", 6, "--set", "data.too_long=cut", out="cut")
    assert "10 examples were cut" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give DATA, --model, --out"),
        (("absent.jsonl", "--model", "m", "--out", "o"), "no certificate"),
        (("absent.jsonl", "--model", "absent", "--out", "o", "--plaintext"), "absent"),
        (("a.jsonl", "--model", "m", "--out", "o", "--set", "training.rate=1"), "did you mean"),
        (("a.jsonl", "--model", "m", "--out", "o", "--set", "x"), "SECTION.KEY=VALUE"),
        (("a.jsonl", "--model", "m", "--out", "o", "--steps", "0"), "steps is 0"),
        (("a.jsonl", "--model", "m", "--out", "o", "--name", "../x"), "cannot be the adapter's"),
        (
            ("a.jsonl", "--model", "m", "--out", "o", "--plaintext", "--epsilon", "1"),
            "without a mechanism",
        ),
        (("--config", "absent.toml"), "absent.toml does not exist"),
    ],
)
def test_what_cannot_be_used(fedsea, monkeypatch, tmp_path, options, words):
    """One line says what is wrong, before anything is connected."""
    monkeypatch.chdir(tmp_path)
    done = fedsea("finetune", *options)
    assert done.exit_code in {2, 3}
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_errors_name_the_line_and_not_the_text(fedsea, server, tiny_model, tmp_path):
    """Private text never reaches the terminal."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Hillary has measles"}\n')
    done = fedsea("finetune", path, "--model", tiny_model, "--out", tmp_path / "o", "--plaintext")
    assert done.exit_code == 2
    assert "bad.jsonl, line 1" in done.stderr
    assert "Hillary" not in done.stderr


def report(step: int, steps: int) -> StepReport:
    """Of one step."""
    return StepReport(step, steps, 0, 1.5, 1e-3, 0.5, 100 * step, 321.0, 10**6, 10**3, 75.0)


def test_lines_without_a_terminal(capsys, monkeypatch):
    """A long run has about twenty lines, the first and the last step among them."""
    lines: list[str] = []
    monkeypatch.setattr(screen, "detail", lines.append)
    with TrainingDisplay() as display:
        display.on_start(0, 1000)
        for step in range(1, 1001):
            display.on_step(report(step, 1000))
        display.on_evaluation(1000, 2.25)
    assert lines[0] == (
        "step 1 of 1000: loss 1.5000, 1:15 min left, 321 tokens/s, 1.0 MB up, 1.0 kB down"
    )
    assert lines[-2].startswith("step 1000 of 1000")
    assert "left" not in lines[-2]
    assert lines[-1] == "step 1000: evaluation 2.2500"
    assert 20 <= len(lines) <= 25


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (7.46, "7.5 s"), (12.4, "12 s"), (59.6, "1:00 min"),
                          (185, "3:05 min"), (3723, "1:02:03 h")]
)  # fmt: skip
def test_durations(seconds, text):
    """Long durations are read without counting seconds."""
    assert screen.duration_text(seconds) == text
