"""`fedsea redteam` on the packaged model: files, verdicts, exit codes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedsea.cli import redteam
from fedsea.cli.app import app
from fedsea.demo import PROMPTS, model_path
from fedsea.demo.trunk_process import TrunkProcess
from fedsea.evaluation import verdict
from fedsea.redteam.report import parse

NOTES = "\n\n".join(
    f"Visit note\nPatient: {name}, {age} years.\nReason: {reason}. Seen on 12 March by Dr Holm."
    for name, age, reason in (
        ("Maria Okafor", 44, "headache"),
        ("Peter Novak", 61, "cough and fever"),
        ("Ana Lindqvist", 29, "back pain"),
        ("Tom Brandt", 52, "a sore throat"),
        ("Eva Costa", 70, "dizziness"),
    )
)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    """Output without colours, the same for whoever runs the tests."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def trained(tmp_path):
    """The file of a projection of the demo model, trained for an instant through the command."""
    text, out = tmp_path / "public.txt", tmp_path / "narrow.safetensors"
    text.write_text("\n\n".join(PROMPTS) * 40, encoding="utf-8")
    short = ("--steps", "2", "--batch", "2", "--window", "32", "--width", "24", "--threads", "1")
    files = ("--text", str(text), "--out", str(out))
    made = CliRunner().invoke(
        app, ["privacy", "train-projection", str(model_path()), *files, *short]
    )
    assert made.exit_code == 0, made.output
    return out


def run(tmp_path, *options):
    """Attack two short texts behind one block of the demo model."""
    text = tmp_path / "notes.txt"
    text.write_text(NOTES, encoding="utf-8")
    small = ("--texts", "2", "--tokens", "16", "--top", "1")
    return CliRunner().invoke(app, ["redteam", "--text", str(text), *small, *options])


def test_a_report_in_all_its_forms(tmp_path):
    """Table, verdicts, a JSON list of rows, a page and Markdown, all of one run."""
    json_file, html, md = (tmp_path / f"report.{kind}" for kind in ("json", "html", "md"))
    result = run(
        tmp_path, "--attacks", "nn,r1,r5", "--mechanism", "fedsea:scale=0.02",
        "--json", str(json_file), "--html", str(html), "--markdown", str(md),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = parse(json_file.read_text(encoding="utf-8"))
    assert [(row.mechanism, row.attack) for row in rows] == [
        ("plain", "prior"), ("plain", "nn"), ("plain", "r1"), ("plain", "r5"),
        ("fedsea", "nn"), ("fedsea", "r1"), ("fedsea", "r5"),
    ]  # fmt: skip
    assert all(row.by_class for row in rows if row.attack == "r1")
    assert isinstance(json.loads(json_file.read_text(encoding="utf-8")), list)
    assert "fedsea:scale=0.02" in result.stdout
    assert "splitting alone hides nothing" in result.stdout
    assert "<svg" in html.read_text(encoding="utf-8")
    assert "**plain**" in md.read_text(encoding="utf-8")


def test_a_report_on_training(tmp_path):
    """Gradients of a run of two steps: read without protection and with noise on rows alone."""
    json_file, html = tmp_path / "report.json", tmp_path / "report.html"
    text = tmp_path / "many.txt"
    text.write_text("\n\n".join([NOTES] * 3), encoding="utf-8")
    options = ("--attacks", "r3,r3t", "--mechanism", "fedsea:scale=0.1", "--steps", "1")
    result = run(
        tmp_path, "--training", "--text", str(text), *options, "--canaries", "0",
        "--json", str(json_file), "--html", str(html), "--check", "mechanisms",
    )  # fmt: skip
    assert result.exit_code == redteam.NOT_PROTECTIVE, result.output
    rows = parse(json_file.read_text(encoding="utf-8"))
    assert [(row.mechanism, row.attack) for row in rows] == [
        ("plain", "prior"), ("plain", "r3"), ("plain", "r3t"),
        ("rows fedsea", "r3"), ("rows fedsea", "r3t"),
    ]  # fmt: skip
    assert rows[-1].recovery == rows[2].recovery > 0.99
    assert rows[2].by_class
    assert "labels from a returned gradient" in html.read_text(encoding="utf-8")


def test_a_check_fails_the_command(tmp_path):
    """A CI that asks for it gets code 10 when a mechanism does not protect; else 0."""
    options = ("--attacks", "r1", "--mechanism", "fedsea:scale=0.02")
    asked = run(tmp_path, *options, "--check", "mechanisms")
    assert asked.exit_code == redteam.NOT_PROTECTIVE
    assert run(tmp_path, *options).exit_code == 0


def test_broken_attacks_fail_the_suite(tmp_path, monkeypatch):
    """When R1 cannot read a clean channel the report says that it proves nothing, with code 9."""
    monkeypatch.setattr(verdict, "FLOOR", 1.01)
    result = run(tmp_path, "--attacks", "nn", "--mechanism", "fedsea:scale=0.02")
    assert result.exit_code == redteam.FLOOR_FAILED
    assert "this report proves nothing" in result.stderr


def test_earlier_rows_are_shown_too(tmp_path):
    """Two runs make one report."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    options = ("--attacks", "r1", "--mechanism", "plain")
    assert run(tmp_path, *options, "--json", str(first)).exit_code == 0
    more = run(tmp_path, *options, "--bottom", "0", "--add", str(first), "--json", str(second))
    assert more.exit_code == 0, more.output
    rows = parse(second.read_text(encoding="utf-8"))
    assert [row.bottom for row in rows] == [1, 1, 0, 0]


def test_real_traffic_is_read_from_a_recording(tmp_path):
    """A prompt that went to a server over gRPC is read back from its recording, word for word."""
    recording = tmp_path / "recording"
    serve = [str(model_path()), "--plaintext", "--address", "127.0.0.1:0", "--threads", "1"]
    with TrunkProcess(serve, tmp_path / "log") as server:
        options = ("--server", server.address(), "--plaintext", "--max-new-tokens", "4")
        sent = CliRunner().invoke(
            app,
            ["generate", str(model_path()), PROMPTS[1], *options, "--recording", str(recording)],
        )
        assert sent.exit_code == 0, sent.output
    read = CliRunner().invoke(app, ["redteam", "--recording", str(recording)])
    assert read.exit_code == 0, read.output
    assert PROMPTS[1] in read.stdout


def test_a_trained_projection_is_attacked_as_it_is_used(tmp_path):
    """Clean, narrowed and protected rows stand apart; R1 reads what the narrow rows still tell."""
    json_file, md = tmp_path / "report.json", tmp_path / "report.md"
    pair = trained(tmp_path)
    result = run(
        tmp_path, "--attacks", "r1", "--mechanism", "fedsea:scale=1e-05", "--projection", str(pair),
        "--json", str(json_file), "--markdown", str(md),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [row for row in parse(json_file.read_text(encoding="utf-8")) if row.attack == "r1"]
    assert [(row.mechanism, row.width) for row in rows] == [
        ("plain", None), ("plain", 24), ("fedsea", 24),
    ]  # fmt: skip
    assert [row.recovery for row in rows] == [1, 1, 1]
    assert rows[1].noise > 0
    page = md.read_text(encoding="utf-8")
    assert "to width 24" in page
    assert "steps 2" in page


def test_narrow_traffic_is_read_from_a_recording_with_its_projection(tmp_path):
    """What a client sent behind a projection over gRPC is read back by who has the pair only."""
    pair, recording = trained(tmp_path), tmp_path / "recording"
    serve = [
        str(model_path()), "--plaintext", "--address", "127.0.0.1:0", "--threads", "1",
        "--projection", str(pair),
    ]  # fmt: skip
    mechanism = ("--mechanism", "fedsea:scale=1e-05")
    with TrunkProcess(serve, tmp_path / "log") as server:
        options = ("--server", server.address(), "--plaintext", "--max-new-tokens", "2")
        sent = CliRunner().invoke(
            app,
            [
                "generate", str(model_path()), PROMPTS[1], *options, *mechanism,
                "--projection", str(pair), "--ledger", str(tmp_path / "ledger"),
                "--recording", str(recording),
            ],
        )  # fmt: skip
        assert sent.exit_code == 0, sent.output
    attack = ("redteam", "--recording", str(recording), *mechanism)
    read = CliRunner().invoke(app, [*attack, "--projection", str(pair)])
    assert read.exit_code == 0, read.output
    assert PROMPTS[1] in read.stdout
    refused = CliRunner().invoke(app, attack)
    assert refused.exit_code == 2
    assert "made with the projection" in refused.stderr
