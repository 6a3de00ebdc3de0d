"""A training that is killed, as a real process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsea.evaluation.training import state_file
from fedsea.model.projection import Projection

ASSETS = Path(__file__).parents[2].parent / "shared" / "assets"
SECONDS = 100


def command(model, text, out, *more):
    """A short training with its noise, saved after every step."""
    return [
        sys.executable, "-m", "fedsea", "privacy", "train-projection", str(model),
        "--text", str(text), "--width", "6", "--window", "24", "--batch", "2", "--threads", "1",
        "--mechanism", "gaussian:clip_norm=1,mu=20", "--save-seconds", "0", "--out", str(out),
        *more,
    ]  # fmt: skip


def run(*arguments):
    """Run a command to its end."""
    subprocess.run(command(*arguments), check=True, capture_output=True, timeout=SECONDS)


def kill_under_way(*arguments):
    """Start a command and kill it without warning once it has saved its state."""
    state = state_file(arguments[2])
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + SECONDS
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    assert process.returncode < 0, "the training ended before it could be killed"
    assert state.exists()


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_a_training_that_was_killed_ends_with_the_same_file(tiny_model, tmp_path):
    """kill -9 in the middle, the same command again: the file is equal byte for byte."""
    text = tmp_path / "public.txt"
    letters = random.Random(0).choices("ABCDEFGH ", k=2000)
    text.write_text("".join(letters), encoding="utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(tiny_model, text, whole, "--steps", "150")
    kill_under_way(tiny_model, text, killed, "--steps", "150")
    run(tiny_model, text, killed, "--steps", "150")
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".partial") == []


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not ASSETS.is_dir(), reason="the folder of shared assets is absent")
def test_training_helps_a_pretrained_model(tmp_path):
    """On TinyStories, 30 steps lower the perplexity of held-out text through narrow, noisy rows."""
    out = tmp_path / "pair"
    done = subprocess.run(
        [
            sys.executable, "-m", "fedsea", "privacy", "train-projection",
            str(ASSETS / "models" / "stories260K"),
            "--text", str(ASSETS / "data" / "tinystories" / "train_first_cased.txt"),
            "--width", "16", "--steps", "30", "--learning-rate", "0.003", "--threads", "1",
            "--mechanism", "stochastic-quantization:bits=4,clip=0.05,mu=60",
            "--json", "--out", str(out),
        ],
        check=True, capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    held_out = json.loads(done.stdout)["held_out"]
    assert held_out["end"]["perplexity"] < 0.8 * held_out["start"]["perplexity"]
    assert Projection.load(out).width == 16
