"""What tests of several folders share: a tiny checkpoint with a tokenizer, certificates, servers."""

from __future__ import annotations

# First, because it settles how gRPC does TLS before anybody else imports gRPC.
import fedsea.transport  # noqa: F401

# isort: split

import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tests.tiny_models import VOCABULARY, save_tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsea.model import linears
from fedsea.server.config import ServerConfig
from fedsea.server.service import TrunkService
from fedsea.transport.certificates import init_ca, issue_client, issue_server

# How long an example takes says how busy the machine is.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

_SPECIAL = ("<pad>", "<s>", "</s>")
# One token for each character, so that any id can be read and any text has as many ids.
CHARACTERS = "".join(map(chr, range(32, 127)))[: VOCABULARY - len(_SPECIAL)]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def packed_linears() -> Iterator[None]:
    """Pack the linears of this process wherever that works.

    Which kernel is faster is measured, and depends on the load: a test must not.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "packing_is_faster", linears.packing_works)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let SIGINT reach what tests start.

    A shell that runs the tests in the background has them ignore it, and children inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are characters, with a chat template."""
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama: hidden 48, 5 blocks, one token for each character."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same shape with other weights."""
    folder = save_tiny(
        "llama", tmp_path_factory.mktemp("other"), max_position_embeddings=2048, rms_norm_eps=1e-5
    )
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, a server certificate for loopback and the tenants acme and globex."""
    folder = tmp_path_factory.mktemp("certificates")
    init_ca(folder)
    issue_server(folder, ["localhost", "127.0.0.1"])
    for tenant in ("acme", "globex"):
        issue_client(folder, tenant)
    return folder


def memory_config(model: Path, /, **sections: dict[str, Any]) -> ServerConfig:
    """Settings of a server in this process; `sections` are tables of its configuration file."""
    table: dict[str, dict[str, Any]] = {
        "server": {"model": str(model), "address": "127.0.0.1:0"},
        "kv": {"rows": 8192, "page_rows": 8},
        "security": {"plaintext": True},
    }
    for name, keys in sections.items():
        table.setdefault(name, {}).update(keys)
    return ServerConfig.from_table(table)


Serve = Callable[..., AbstractAsyncContextManager[TrunkService]]


@pytest.fixture
def serve_tiny(tiny_model: Path) -> Serve:
    """Run a server of the tiny model on the current loop; afterwards nothing may be held in it."""

    @asynccontextmanager
    async def serve(**sections: dict[str, Any]) -> AsyncIterator[TrunkService]:
        async with TrunkService.load(memory_config(tiny_model, **sections)) as service:
            yield service
        pool = service.trunk.runner.pool
        pool.check_integrity()
        assert pool.num_accounts == 0

    return serve
