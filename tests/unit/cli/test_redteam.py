"""Options of `fedsea redteam` that are refused before anything is attacked."""

from __future__ import annotations

import pytest


@pytest.fixture
def text(tmp_path):
    """A text file that is long enough."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join("the quick brown fox jumps over it" for _ in range(30)))
    return path


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--attacks", "r9"], "'r9' is not known"),
        (["--attacks", ","], "there is no attack"),
        (["--knowledge", "black-box", "--attacks", "r1"], "needs weights"),
        (["--mechanism", "rot13"], "rot13"),
        (["--mechanism", "fedsea:scale=x"], "scale=x"),
        (["--tokens", "3"], "8 tokens"),
        (["--tokens", "90000"], "90000 tokens"),
        (["--texts", "0"], "1 text"),
        (["--json", "absent/rows.json"], "cannot be written"),
        (["--add", "absent.json"], "cannot be read"),
        (["--public", "absent.txt"], "cannot be read as text"),
    ],
)
def test_what_cannot_be_used_is_refused(fedsea, text, tiny_model, options, says):
    """Each is one line that names what is wrong, and exit code 2."""
    result = fedsea("redteam", "--model", tiny_model, "--text", text, *options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_a_cut_without_a_trunk_is_refused(fedsea, text, tiny_model):
    """The partition must leave blocks for the server."""
    result = fedsea("redteam", "--model", tiny_model, "--text", text, "--bottom", 5)
    assert result.exit_code == 3
    assert "error: " in result.stderr


def test_a_damaged_report_is_refused(fedsea, text, tiny_model, tmp_path):
    """Rows to add must be rows."""
    damaged = tmp_path / "rows.json"
    damaged.write_text('[{"attack": "r1"}]')
    result = fedsea("redteam", "--model", tiny_model, "--text", text, "--add", damaged)
    assert result.exit_code == 2
    assert "no row of a red team report" in result.stderr


def test_there_must_be_something_to_attack(fedsea, tiny_model, tmp_path):
    """Neither a text nor a recording, a recording that is none, and two mechanisms for one."""
    nothing = fedsea("redteam", "--model", tiny_model)
    assert nothing.exit_code == 2
    assert "--text or --recording" in nothing.stderr
    other = tmp_path / "other"
    other.write_text("text")
    result = fedsea("redteam", "--model", tiny_model, "--recording", other)
    assert result.exit_code == 2
    assert "no recording" in result.stderr
    two = ("--mechanism", "plain", "--mechanism", "fedsea:scale=1")
    assert fedsea("redteam", "--model", tiny_model, "--recording", other, *two).exit_code == 2


def test_a_projection_or_denoiser_that_is_none_is_refused(fedsea, text, tiny_model, tmp_path):
    """Files are opened before anything is attacked; a recording has no denoiser."""
    for option in ("--projection", "--denoiser"):
        absent = fedsea("redteam", "--model", tiny_model, "--text", text, option, tmp_path / "none")
        assert absent.exit_code == 3
        assert "none" in absent.stderr
        assert "Traceback" not in absent.output
    given = ("--recording", text, "--denoiser", text)
    result = fedsea("redteam", "--model", tiny_model, *given)
    assert result.exit_code == 2
    assert "stays with the client" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--attacks", "r2"], "not known for training"),
        (["--gradients", "rot13"], "rot13"),
        (["--gradient-noise", "0"], "above 0"),
        (["--texts", "2000"], "to hold out as many"),
        (["--bottom", "0", "--attacks", "r7"], "R7"),
        (["--sweep"], "--sweep is about requests"),
        (["--knowledge", "leaked"], "--knowledge is about requests"),
        (["--rank", "0"], "rank"),
    ],
)
def test_what_cannot_be_used_in_training_is_refused(fedsea, text, tiny_model, options, says):
    """Each is one line that names what is wrong, and exit code 2."""
    result = fedsea(
        "redteam", "--training", "--model", tiny_model, "--text", text, "--tokens", 8, "--texts", 2,
        *options,
    )  # fmt: skip
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output
