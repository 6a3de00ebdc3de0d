"""`fedsea privacy calibrate` and the trainings on public text, in this process."""

from __future__ import annotations

import json
import random

import pytest

from fedsea.model.adapters import read_adapter
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Span
from fedsea.model.projection import Projection
from fedsea.model.prompts import read_prompt
from fedsea.privacy.calibration import Calibration
from fedsea.privacy.denoiser import Denoiser

HIDDEN, WIDTH = 48, 6
SHORT = ("--steps", 2, "--window", 12, "--batch", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of public text for the tiny model's tokenizer."""
    file = tmp_path_factory.mktemp("text") / "public.txt"
    letters = random.Random(0).choices("ABCDEFGH ", k=600)
    file.write_text("".join(letters), encoding="utf-8")
    return file


@pytest.fixture
def out(tmp_path):
    """Where a command writes."""
    return tmp_path / "result.safetensors"


def test_a_calibration_is_written_and_shown(fedsea, tiny_model, text, out):
    """The file fits the model, and the table suggests clip norms."""
    done = fedsea("privacy", "calibrate", tiny_model, "--text", text, "--out", out,
                  "--bottom", 2, "--window", 12)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = Calibration.load(out)
    found.check_fits(HIDDEN, 2, Checkpoint.open(tiny_model).fingerprint())
    assert f"{found.rows} public rows" in done.stdout
    assert f"{found.clip_norm(0.99):.4g}" in done.stdout


def test_a_projection_is_trained_with_its_halves(fedsea, tiny_model, text, out):
    """Whole and halves are written, the state is gone, and held-out figures are shown."""
    done = fedsea("privacy", "train-projection", tiny_model, "--text", text, "--width", WIDTH,
                  "--mechanism", "stochastic-quantization:bits=4,clip=0.05,mu=20",
                  "--halves", "--json", "--out", out, *SHORT)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    whole = Projection.load(out)
    whole.check_fits(HIDDEN, 1, Checkpoint.open(tiny_model).fingerprint())
    assert whole.width == WIDTH
    encoder, decoder = (Projection.load(f"{out}.{half}") for half in ("encoder", "decoder"))
    assert whole.fingerprint() == encoder.fingerprint() == decoder.fingerprint()
    assert encoder.decoder is None
    assert decoder.encoder is None
    assert len(list(out.parent.iterdir())) == 3
    shown = json.loads(done.stdout)
    assert shown["fingerprint"] == whole.fingerprint()
    assert set(shown["held_out"]) == {"start", "end"}


def test_calibration_projection_and_denoiser_work_together(fedsea, tiny_model, text, tmp_path):
    """A denoiser for a projection and a mechanism around its public centre."""
    pair, center, out = (tmp_path / name for name in ("pair", "center", "denoiser"))
    shared = (tiny_model, "--text", text, "--window", 12)
    steps = ("--steps", 1, "--batch", 2)
    for arguments in (
        ("train-projection", *shared, *steps, "--width", WIDTH, "--out", pair),
        ("calibrate", *shared, "--projection", pair, "--out", center),
        ("train-denoiser", *shared, *steps, "--projection", pair, "--calibration", center,
         "--mechanism", "gaussian:clip_norm=1,mu=8", "--inner", 8, "--heads", 2, "--layers", 1,
         "--out", out),
    ):  # fmt: skip
        done = fedsea("privacy", *arguments)
        assert done.exit_code == 0, done.stderr
    assert "without" in done.stdout
    found = Denoiser.load(out)
    assert found.purpose.projection == Projection.load(pair).fingerprint()
    assert "center=" in found.purpose.mechanism
    assert (found.shape.hidden, found.shape.noise) == (HIDDEN, WIDTH)


def test_a_prompt_is_trained_with_an_adapter(fedsea, tiny_model, text, tmp_path):
    """Both folders are in PEFT's format, the state is gone, and held-out figures are shown."""
    pair, out = tmp_path / "pair", tmp_path / "tuned"
    shared = (tiny_model, "--text", text, "--window", 12, "--batch", 2)
    done = fedsea("privacy", "train-projection", *shared, "--steps", 0, "--width", WIDTH,
                  "--out", pair)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    done = fedsea("privacy", "train-prompt", *shared, "--steps", 2, "--projection", pair,
                  "--mechanism", "stochastic-quantization:bits=2,clip=0.5,mu=20",
                  "--rows", 3, "--adapter-rank", 2, "--adapter-part", "trunk",
                  "--adapter-part", "top", "--json", "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    prompt = read_prompt(out / "prompt")
    assert prompt.count == 3
    prompt.check_fits(HIDDEN, 1, Checkpoint.open(tiny_model).fingerprint())
    blocks = {place.block for place in read_adapter(out / "adapter", Span(0, 5)).factors}
    assert blocks == {1, 2, 3, 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair", "tuned"]
    held_out = json.loads(done.stdout)["held_out"]
    assert set(held_out) == {"without", "start", "end"}
    assert set(held_out["end"]) == {"perplexity", "agreement"}


def test_a_prompt_without_noise_is_shown_as_a_table(fedsea, tiny_model, text, tmp_path):
    """Mode plain is allowed; there is no column for what was not measured."""
    done = fedsea("privacy", "train-prompt", tiny_model, "--text", text, "--rows", 2,
                  "--out", tmp_path / "tuned", *SHORT)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "error" not in done.stdout
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == ["prompt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", -1), "rows"),
        (("--rows", 0), "nothing is trained"),
        (("--adapter-rank", 2, "--adapter-part", "top", "--top", 0), "top has no blocks"),
        (("--mechanism", "noise:x=1"), "known"),
        (("--learning-rate", 0), "learning rate"),
    ],
)
def test_a_prompt_that_cannot_be_trained_is_one_clear_line(
    fedsea, tiny_model, text, out, arguments, message
):
    """Nothing is written."""
    done = fedsea("privacy", "train-prompt", tiny_model, "--text", text, "--out", out,
                  "--window", 12, *arguments)  # fmt: skip
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_a_client_bundle_trains_for_the_rows(fedsea, tiny_model, text, tmp_path):
    """Without a trunk the error of the rows can be lowered; next tokens cannot be seen."""
    bundles = tmp_path / "bundles"
    assert fedsea("split", tiny_model, bundles, "--part", "client").exit_code == 0
    shared = (bundles / "client", "--text", text, "--width", WIDTH, "--out", tmp_path / "pair")
    done = fedsea("privacy", "train-projection", *shared, *SHORT, "--objective", "mse")
    assert done.exit_code == 0, done.stderr
    done = fedsea("privacy", "train-projection", *shared, *SHORT, "--objective", "nll")
    assert done.exit_code == 3
    assert "block" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--width", HIDDEN + 1), 2, "width"),
        (("--width", 4, "--mechanism", "noise:x=1"), 2, "known"),
        (("--width", 4, "--bottom", 9), 3, "trunk"),
        (("--width", 4, "--window", 1), 2, "window"),
        (("--width", 4, "--learning-rate", 0), 2, "learning rate"),
        (("--width", 4, "--steps", -1), 2, "steps"),
        (("--width", 4, "--batch", 0), 2, "batch"),
        (("--width", 4, "--text", "no-such-file"), 2, "cannot be read"),
    ],
)
def test_bad_options_are_one_clear_line(fedsea, tiny_model, text, out, arguments, code, message):
    """Each is refused before anything is written."""
    done = fedsea("privacy", "train-projection", tiny_model, "--text", text, "--out", out,
                  "--window", 12, *arguments)  # fmt: skip
    assert done.exit_code == code
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_what_does_not_fit_is_refused(fedsea, tiny_model, other_model, text, tmp_path):
    """A projection of another model, of another cut, and a file that is none."""
    pair, out = tmp_path / "pair", tmp_path / "center"
    done = fedsea("privacy", "train-projection", other_model, "--text", text, "--width", 4,
                  "--out", pair, *SHORT)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    used = ("--text", text, "--projection", pair, "--window", 12, "--out", out)
    for model, more, message in (
        (tiny_model, (), "checkpoint"),
        (other_model, ("--bottom", 2), "bottom=1"),
        (other_model, ("--projection", text), "no projection"),
    ):
        done = fedsea("privacy", "calibrate", model, *used, *more)
        assert done.exit_code in (2, 3)
        assert message in done.stderr
    assert not out.exists()
