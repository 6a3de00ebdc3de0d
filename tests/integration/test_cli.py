"""The commands against a real server: a second process, TLS, certificates from `fedsea certs`."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import structlog
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedsea.cli.app import app
from fedsea.client.protection import PLAIN
from fedsea.demo import CHAT_PROMPT, PROMPTS, model_path
from fedsea.demo.trunk_process import TrunkProcess
from fedsea.demo.unsplit import tokens
from fedsea.errors import DeadlineExceeded, TransportError
from fedsea.privacy.gaussian_loss import GaussianLoss
from fedsea.transport import certificates
from fedsea.transport.certificates import init_ca, issue_client, issue_server

PROMPT = PROMPTS[0]


@dataclass(frozen=True)
class Provider:
    """A running server and what a client needs to reach it."""

    address: str
    certs: Path

    @property
    def options(self) -> list[str]:
        return ["--server", self.address, "--certs", str(self.certs)]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    """Output without colours, the same for whoever runs the tests."""
    for name in ("FEDSEA_SERVER", "FEDSEA_CERTS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A server that starts in this process takes over logging; give it back."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def model() -> Path:
    """The packaged model: 8 blocks."""
    return model_path()


@pytest.fixture(scope="module")
def certs(tmp_path_factory) -> Path:
    """A CA, the server's certificate and a client's."""
    folder = Path(tmp_path_factory.mktemp("certs"))
    init_ca(folder)
    issue_server(folder, ["127.0.0.1"])
    issue_client(folder, "acme")
    return folder


def serve_arguments(model: Path, certs: Path, address: str) -> list[str]:
    """A small server of the blocks 1:7."""
    return [
        str(model), "--span", "1:7", "--address", address, "--certs", str(certs),
        "--kv-rows", "8192", "--threads", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def provider(model, certs, tmp_path_factory) -> Iterator[Provider]:
    """A server process that all tests of this file share."""
    log = tmp_path_factory.mktemp("server") / "log"
    with TrunkProcess(serve_arguments(model, certs, "127.0.0.1:0"), log) as process:
        yield Provider(process.address(), certs)


def fedsea(*arguments: object, stdin: str | None = None):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def started(*arguments: object) -> subprocess.Popen[str]:
    """Start a command as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedsea", *(str(argument) for argument in arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def unsplit(llm_ids: list[int], model: Path, count: int) -> list[int]:
    """The whole model's continuation, as token ids."""
    return list(tokens(model, [llm_ids], count)[0])


@pytest.fixture(scope="module")
def tokenizer(model):
    """The packaged model's tokenizer."""
    return AutoTokenizer.from_pretrained(model)


def without_mode(stderr: str) -> str:
    """Standard error after the line that says the mode, which comes once a server was found."""
    first, end, rest = stderr.partition("\n")
    return rest if end and first.startswith("mode ") else stderr


def failure(result) -> tuple[int, str]:
    """Exit code and the one line of standard error of a command that failed."""
    assert result.stdout == ""
    stderr = without_mode(result.stderr)
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return result.exit_code, stderr


def test_generate_streams_the_text_of_the_unsplit_model(provider, model, tokenizer):
    """Standard output is the answer and nothing else; standard error says the mode."""
    process = started("generate", model, PROMPT, *provider.options, "--max-new-tokens", 40)
    text, errors = process.communicate(timeout=60)
    ids = tokenizer(PROMPT).input_ids
    expected = tokenizer.decode(ids + unsplit(ids, model, 40), skip_special_tokens=True)

    assert (process.returncode, errors) == (0, f"mode plain: {PLAIN}\n")
    assert PROMPT + text.removesuffix("\n") == expected


def test_generate_reads_a_pipe_and_writes_json(provider, model, tokenizer):
    """With --json all figures come as one object, tokens included."""
    result = fedsea(
        "generate", model, *provider.options, "--max-new-tokens", 12, "--json", stdin=PROMPT + "\n"
    )
    found = json.loads(result.stdout)

    assert (result.exit_code, result.stderr) == (0, "")
    assert found["token_ids"] == unsplit(tokenizer(PROMPT).input_ids, model, 12)
    assert found["notices"] == []
    assert found["wire"]["up"]["messages"] >= 12


NOISY = "gaussian:clip_norm=20,mu=100"


def test_generate_says_what_noise_costs(provider, model, tmp_path):
    """With a mechanism the mode, the charges and what is left are said; a full budget ends it."""
    ledger = tmp_path / "privacy.ledger"
    arguments = [
        "generate", model, PROMPT, *provider.options, "--max-new-tokens", 4, "--ignore-eos",
        "--mechanism", NOISY, "--ledger", ledger,
    ]  # fmt: skip
    result = fedsea(*arguments, "--epsilon", 300_000)
    mode, *_, charges = result.stderr.splitlines()

    assert result.exit_code == 0, result.stderr
    epsilon = GaussianLoss(100.0).epsilon(1e-5)
    start = f"mode noisy: {NOISY},by=row; one release: mu 100, epsilon {epsilon:.4g} at"
    assert mode.startswith(start)
    assert mode.endswith("budget epsilon 300000 at delta 1e-05")
    assert "releases charged, unit prompt: mu " in charges
    found = json.loads(fedsea(*arguments, "--json").stdout)
    assert found["mode"] == "noisy"
    assert found["privacy"]["releases"] == found["privacy"]["mu"] ** 2 / 100**2
    exit_code, message = failure(fedsea(*arguments, "--max-new-tokens", 300, "--json"))
    assert exit_code == 8
    assert "not fit into the budget epsilon 300000" in message


def test_options_of_privacy_that_do_not_fit(provider, model, tmp_path):
    """A mechanism that is unknown, and options without one, end with one line."""
    start = ["generate", model, PROMPT, *provider.options]
    exit_code, message = failure(fedsea(*start, "--mechanism", "whitening"))
    assert (exit_code, "known: plain, gaussian" in message) == (2, True)
    exit_code, message = failure(fedsea(*start, "--record", "r"))
    assert (exit_code, "--record is given without a mechanism" in message) == (2, True)


def test_generate_shows_figures_and_samples(provider, model):
    """--stats adds two lines; several samples are set apart on standard error."""
    result = fedsea(
        "generate", model, PROMPT, *provider.options, "--max-new-tokens", 8, "--stats",
        "--n", 2, "--temperature", 1.0, "--seed", 3,
    )  # fmt: skip

    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stderr
    assert "messages up" in result.stderr
    assert "sample 2" in result.stderr


def test_an_answer_survives_the_death_of_the_server(model, certs, tokenizer, tmp_path):
    """kill -9 in mid-answer and a new process: the same tokens, and a notice of both events."""
    log = tmp_path / "log"
    with TrunkProcess(serve_arguments(model, certs, "127.0.0.1:0"), log) as first:
        address = first.address()
        process = started(
            "generate", model, PROMPT, "--server", address, "--certs", certs,
            "--max-new-tokens", 600, "--ignore-eos",
        )  # fmt: skip
        assert process.stdout is not None
        begun = process.stdout.read(20)
        first.kill()
        with TrunkProcess(serve_arguments(model, certs, address), log) as second:
            second.address()
            rest, errors = process.communicate(timeout=90)
    ids = tokenizer(PROMPT).input_ids
    assert process.returncode == 0, errors
    assert "lost" in errors
    assert "rows sent again" in errors
    assert begun + rest.removesuffix("\n") == endless_text(tokenizer, ids, model, 600)


def endless_text(tokenizer, ids: list[int], model: Path, count: int) -> str:
    """The text after the prompt of the unsplit model that ignores the end of text."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    grown = whole.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count, do_sample=False, eos_token_id=-1,
    )  # fmt: skip
    text = tokenizer.decode(grown[0].tolist(), skip_special_tokens=True)
    return str(text).removeprefix(tokenizer.decode(ids, skip_special_tokens=True))


def test_ctrl_c_ends_an_answer_quietly(provider, model):
    """SIGINT in mid-answer is exit code 130 without a traceback."""
    for _ in range(3):  # on a busy machine the answer can be complete before the signal comes
        process = started(
            "generate", model, PROMPT, *provider.options, "--max-new-tokens", 900, "--ignore-eos"
        )
        assert process.stdout is not None
        process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        if process.returncode:
            break

    assert (process.returncode, without_mode(errors)) == (130, "")


def test_a_server_stops_in_order_on_sigterm(model, certs):
    """The ready line is all of standard output, and SIGTERM is exit code 0."""
    process = started("serve", *serve_arguments(model, certs, "127.0.0.1:0"))
    assert process.stdout is not None
    ready = process.stdout.readline()
    process.terminate()
    rest, _ = process.communicate(timeout=30)

    assert ready.startswith("serving blocks 1:7 of ")
    assert (process.returncode, rest) == (0, "")


def test_chat_works_in_a_pipe(provider, model):
    """Each line gets an answer on standard output; commands answer on standard error."""
    result = fedsea(
        "chat", model, *provider.options, "--max-new-tokens", 16,
        stdin=f"{CHAT_PROMPT}\n/stats\n/undo\n/quit\n",
    )  # fmt: skip

    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    assert "16 out" in result.stderr
    assert "0 messages are left" in result.stderr


def test_bench_measures_a_live_server(provider, model):
    """Bytes per token are those of the rows and a small frame; times add up."""
    result = fedsea(
        "bench", model, *provider.options, "--rounds", 2, "--prompt-tokens", 16,
        "--new-tokens", 8, "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)

    assert result.exit_code == 0, result.stderr
    assert found["rounds"] == 2
    assert 512 < found["bytes_per_token"]["up"] < 560
    assert 0 < found["server_seconds"]["median"] < found["token_seconds"]["median"]


def test_bench_prints_a_table(provider, model):
    """Without --json the same is a table."""
    result = fedsea("bench", model, *provider.options, "--rounds", 1, "--new-tokens", 4)

    assert result.exit_code == 0, result.stderr
    for words in ("tokens/s", "time to first token", "queue and wire", "bytes up per token"):
        assert words in result.stdout


def test_inspect_shows_both_sides_and_the_wire(model):
    """The table and the object say the same."""
    table = fedsea("inspect", model, "--bottom", 2, "--top", 1, "--context", 100)
    found = json.loads(
        fedsea("inspect", model, "--bottom", 2, "--top", 1, "--context", 100, "--json").stdout
    )

    assert table.exit_code == 0, table.stderr
    assert "0:2, 7:8" in table.stdout
    assert f"{found['client']['parameters']:,}" in table.stdout
    assert found["server"]["spans"] == ["2:7"]
    assert found["wire"]["int8"] == {
        "token_up": 130, "token_down": 130, "prompt_up": 13000, "prompt_down": 13000,
    }  # fmt: skip


def test_bundles_generate_what_the_whole_checkpoint_does(provider, model, tmp_path):
    """`split` writes what `generate` takes; the server still holds the same model."""
    split = fedsea("split", model, tmp_path / "parts", "--bottom", 1, "--top", 1)
    assert split.exit_code == 0, split.stderr
    options = [PROMPT, *provider.options, "--max-new-tokens", 8]
    whole = fedsea("generate", model, *options)
    bundle = fedsea("generate", tmp_path / "parts" / "client", *options)

    assert "the provider: the trunk's blocks" in split.stderr
    assert (bundle.exit_code, bundle.stdout) == (0, whole.stdout)


# ---------------------------------------------------------------------------------------------
# Bad input: one line that names the fix, and the exit code of its kind.


def test_nobody_answers(model, certs):
    """An address without a server."""
    code, line = failure(
        fedsea("generate", model, "hi", "--server", "127.0.0.1:1", "--certs", certs)
    )

    assert code == 5
    assert "is the server running there?" in line


def test_another_model(provider, model, tmp_path):
    """A client whose checkpoint is not the server's is told both names."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, line = failure(fedsea("generate", other, "hi", *provider.options))

    assert code == 3
    assert "use the same checkpoint on both" in line


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        (["--bottom", "0"], "serves blocks 1:7 and this partition needs 0:7"),
        (["--bottom", "5", "--top", "3"], "leave no trunk in a model of 8 blocks"),
        (["--bottom", "-1"], "neither can be negative"),
    ],
)
def test_wrong_partitions(provider, model, partition, words):
    """A span that is not served, no trunk at all, and nonsense."""
    code, line = failure(fedsea("generate", model, "hi", *provider.options, *partition))

    assert code == 3
    assert words in line


def test_prompts_that_are_too_long(provider, model):
    """Prompt and answer must fit the context."""
    code, line = failure(
        fedsea("generate", model, "hi", *provider.options, "--max-new-tokens", 5000)
    )

    assert code == 2
    assert "shorten the prompt or lower max_new_tokens" in line


def test_foreign_certificates(provider, model, tmp_path):
    """A client of another CA is refused by name, not with a hang."""
    init_ca(tmp_path)
    issue_client(tmp_path, "acme")
    code, line = failure(
        fedsea("generate", model, "hi", "--server", provider.address, "--certs", tmp_path)
    )

    assert code == 6
    assert "CA" in line


class LongAgo(datetime):
    """A clock that is a hundred days behind."""

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) - timedelta(days=100)


def test_expired_certificates(provider, model, tmp_path, monkeypatch):
    """A certificate that ended ten days ago is named, with the way to a new one."""
    old = tmp_path / "old"
    shutil.copytree(provider.certs, old)
    monkeypatch.setattr(certificates, "datetime", LongAgo)
    issue_client(old, "acme", days=90, force=True)
    code, line = failure(
        fedsea("generate", model, "hi", "--server", provider.address, "--certs", old)
    )

    assert code == 6
    assert "client-acme.pem expired on" in line
    assert "fedsea certs" in line


def test_ports_in_use(provider, model):
    """A second server at the same address."""
    code, line = failure(fedsea("serve", *serve_arguments(model, provider.certs, provider.address)))

    assert code == 5
    assert "the port is in use" in line


@pytest.mark.parametrize("command", ["inspect", "serve", "generate"])
def test_missing_models(certs, command):
    """A folder that is not there."""
    options = {"serve": ["--certs", certs], "generate": ["hi", "--certs", certs], "inspect": []}
    code, line = failure(fedsea(command, "/nowhere/model", *options[command]))

    assert code == 3
    assert "there is no folder /nowhere/model" in line


def test_corrupt_checkpoints(model, certs, tmp_path):
    """A file that was cut short is named, by the server and by the client."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for arguments in (
        ["serve", broken, "--certs", certs],
        ["generate", broken, "hi", "--certs", certs],
        ["inspect", broken],
    ):
        code, line = failure(fedsea(*arguments))
        assert code == 3
        assert "model.safetensors" in line


def test_too_little_memory(model, certs):
    """A KV pool that this machine cannot hold is refused before it is taken."""
    code, line = failure(fedsea("serve", model, "--certs", certs, "--kv-rows", 10**12))

    assert code == 3
    assert "are free" in line


def test_a_server_process_that_cannot_start_says_why(tmp_path):
    """The process's own error reaches whoever started it."""
    with (
        TrunkProcess(["/nowhere/model", "--plaintext"], tmp_path / "log") as process,
        pytest.raises(TransportError, match="there is no folder /nowhere/model"),
    ):
        process.address()


def test_a_server_process_that_takes_too_long_is_given_up(tmp_path):
    """Waiting for the ready line has an end."""
    with (
        TrunkProcess(["/nowhere/model", "--plaintext"], tmp_path / "log") as process,
        pytest.raises(DeadlineExceeded),
    ):
        process.address(within=0.01)
