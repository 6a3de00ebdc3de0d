"""`LLM`: a language model whose trunk is served elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from fedsea.client.attested import Attestation
from fedsea.client.background import Background, Pending
from fedsea.client.connecting import (
    Servers,
    close_all,
    codec_of,
    endpoints_of,
    first_description,
    placement_of,
)
from fedsea.client.generation import Completion, Request, complete
from fedsea.client.link import Patience, Tell
from fedsea.client.local import LocalParts
from fedsea.client.protection import PLAIN, Cut, Mode, Protection, ReleasePolicy
from fedsea.client.releases import DEFAULT_MEMORY, ReleaseStore
from fedsea.client.sampling import SamplingParams
from fedsea.client.servers import Expectation
from fedsea.client.split import Progress, SplitModel
from fedsea.client.streams import Feed, Stream
from fedsea.client.together import together
from fedsea.errors import (
    CheckpointError,
    ConfigError,
    FedseaError,
    LedgerError,
    RequestError,
)
from fedsea.model.adapters import read_adapter
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.inspection import check_memory, client_weights
from fedsea.model.partition import Partition
from fedsea.privacy.attestation import Attested, Verifier
from fedsea.privacy.placeholders.config import Placeholders
from fedsea.privacy.placeholders.substitution import Substitution
from fedsea.transport.credentials import ClientTLS, Plaintext
from fedsea.wire.codecs import RowFormat

logger = logging.getLogger("fedsea.client")

Message = Mapping[str, str]

DEFAULT_KV_ROWS = 16384


class LLM:
    """A model split between this process and a server.

    Make one with `LLM.connect`. Calls may come from any thread; requests of all threads are
    computed together. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        split: SplitModel,
        tokenizer: PreTrainedTokenizerBase,
        background: Background,
        placeholders: Placeholders | None = None,
        attestation: Attestation | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._placeholders = placeholders
        self._attestation = attestation
        self._split = split
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids(checkpoint)
        self._background = background
        self._closed = False

    @classmethod
    def connect(
        cls,
        model: str | Path,
        servers: Servers,
        *,
        partition: Partition | tuple[int, int] = (1, 1),
        tls: ClientTLS | Plaintext | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        codec: str = "auto",
        quantization: str = "none",
        compile: bool = False,  # noqa: A002 - the word that users know from torch
        kv_rows: int = DEFAULT_KV_ROWS,
        release_memory: int = DEFAULT_MEMORY,
        patience: Patience | None = None,
        on_notice: Tell | None = None,
        adapter: str | Path | None = None,
        trunk_adapter: str = "",
        trunk_prompt: str = "",
        placeholders: Placeholders | None = None,
        privacy: Protection | None = None,
        verifier: Verifier | None = None,
        revision: str | None = None,
    ) -> LLM:
        """Load bottom and top, find a server, and check that it serves the same model.

        Args:
            model: folder of a checkpoint or of a client bundle, or a hub id.
            servers: addresses HOST:PORT in order of preference; later ones take over when the
                first fails. A mapping from names to channel makers serves other transports.
            partition: how many blocks stay here, (bottom, top).
            tls: this client's certificate, key and CA.
            dtype: "fp32", "bf16", "fp16", or "auto" for that of the checkpoint.
            device: where bottom and top run.
            codec: how rows travel: "fp32", "bf16", "fp16", "int8", or "auto" for the dtype's.
            quantization: weight format of bottom and top: "none", "int8" or "nf4".
            compile: let torch compile the decoding steps here; takes a C++ compiler and a minute.
            kv_rows: rows of context that all requests of this process share.
            release_memory: bytes of releases kept in memory; more go to a temporary file.
            patience: how long to wait for places, answers and absent servers.
            on_notice: called with one line when the connection breaks or comes back.
            adapter: folder of a LoRA adapter in PEFT's format; its parts for bottom and top are
                used here.
            trunk_adapter: the server's name for the adapter's other part.
            trunk_prompt: the server's name for a soft prompt in front of every sequence.
            placeholders: which sensitive spans of prompts are replaced before they are tokenized,
                and put back into answers.
            privacy: the mechanism that rows go through before they leave, and the ledger that
                counts; None sends rows as they are, in the mode plain.
            verifier: decides, by a token that it shows, whether a server may get anything; None
                asks for no proof. Needs certificates.
            revision: of a hub id.

        Raises:
            CheckpointError, UnsupportedModel, PartitionError, ConfigError: local trouble.
            LedgerError: the ledger cannot be used.
            Unreachable, FingerprintMismatch, SecurityError: trouble with the server; an
                AttestationError says that it did not prove what it runs.
        """
        checkpoint = Checkpoint.open(model, revision)
        chosen = partition if isinstance(partition, Partition) else Partition(*partition)
        placement = placement_of(checkpoint, dtype, device, quantization)
        row_codec = codec_of(codec, placement.dtype)
        trunk = chosen.trunk_span(checkpoint.num_blocks)
        tell = on_notice or logger.warning
        attestation = None if verifier is None else Attestation(verifier, tell)
        endpoints = endpoints_of(servers, tls, attestation)
        tokenizer = load_tokenizer(checkpoint)
        check_memory(
            client_weights(checkpoint, chosen, placement.kept_dtype),
            "bottom and top",
            placement.device,
        )
        folder = None if adapter is None else Path(adapter)
        parts = LocalParts.load(checkpoint, chosen, placement, kv_rows, compile, folder)
        if folder is not None and not trunk_adapter and read_adapter(folder, trunk).factors:
            tell(
                f"{folder} changes blocks {trunk} too, which the server computes without it: "
                "give trunk_adapter, the name that the server has for it"
            )
        policy, up = None, RowFormat(row_codec, checkpoint.hidden_size)
        if privacy is not None:
            policy = privacy.applied(_cut(checkpoint, chosen), row_codec, tokenizer)
            up = policy.rows
        expectation = Expectation(
            model=checkpoint.name,
            fingerprint=checkpoint.fingerprint(),
            hidden_size=checkpoint.hidden_size,
            trunk=trunk,
            codecs=(up.codec, row_codec),
            projection="" if policy is None else policy.projection_name,
        )
        background = Background("fedsea-client")
        waits = patience or Patience()
        try:
            description = background.run(first_description(endpoints, expectation))
        except FedseaError:
            background.stop(close_all(endpoints))
            if policy is not None:
                policy.close()
            raise
        split = SplitModel(
            parts=parts,
            endpoints=endpoints,
            expectation=expectation,
            description=description,
            store=ReleaseStore(release_memory),
            patience=waits,
            tell=tell,
            up=up,
            down=RowFormat(row_codec, checkpoint.hidden_size),
            policy=policy,
            adapter=trunk_adapter,
            prompt=trunk_prompt,
        )
        connected = cls(checkpoint, split, tokenizer, background, placeholders, attestation)
        if logger.isEnabledFor(logging.INFO):
            logger.info("connected to %s: %s", description.model, connected.describe_mode())
        return connected

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint or client bundle."""
        return self._checkpoint

    @property
    def split(self) -> SplitModel:
        """The parts and servers, for those who build on them."""
        return self._split

    @property
    def background(self) -> Background:
        """The loop on which sessions live."""
        return self._background

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; it exists only on this side."""
        return self._tokenizer

    @property
    def placeholders(self) -> Placeholders | None:
        """What is replaced in prompts, if anything is."""
        return self._placeholders

    @property
    def privacy(self) -> ReleasePolicy | None:
        """The rules by which rows leave; None in the mode plain."""
        return self._split.policy

    @property
    def mode(self) -> Mode:
        """What protects the text from whoever runs the trunk."""
        if self._attestation is not None:
            return Mode.ATTESTED
        return Mode.PLAIN if self._split.policy is None else Mode.NOISY

    @property
    def attested(self) -> Attested | None:
        """What the server in use proved, as far as proof was demanded."""
        return None if self._attestation is None else self._attestation.latest

    def describe_mode(self) -> str:
        """The mode, and in numbers what it guarantees, in one line for people.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        policy, attested = self._split.policy, self.attested
        grounds = [] if attested is None else [attested.describe()]
        grounds += [] if policy is None else [policy.describe()]
        return f"mode {self.mode}: {'; '.join(grounds) or PLAIN}"

    def __repr__(self) -> str:
        about = self._split.description
        blocks = f"{about.num_blocks} blocks, {self._split.expectation.trunk} at the server"
        try:
            mode = self.describe_mode()
        except LedgerError as error:
            mode = f"mode {self.mode}: {error}"
        return f"<LLM {self._checkpoint.name}, {blocks}; {mode}>"

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._eos_ids

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt; ids are taken as they are.

        Raises:
            RequestError: the prompt is empty or not valid Unicode, or an id is not in the model's
                vocabulary.
        """
        if isinstance(prompt, str):
            check_unicode(prompt)
        ids = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        return self.checked(ids)

    def checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids, if all of them are in the model's vocabulary.

        Raises:
            RequestError: one is not.
        """
        vocabulary = int(self._checkpoint.config.vocab_size)
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise RequestError(
                f"the prompt has ids outside the model's vocabulary of {vocabulary}; "
                "use the tokenizer of this model"
            )
        return tuple(int(token) for token in ids)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template, ready for the answer.

        Raises:
            RequestError: the tokenizer has no chat template, or a message is not valid Unicode.
        """
        for message in messages:
            check_unicode(message.get("content", ""))
        if not self._tokenizer.chat_template:
            raise RequestError(
                "this model's tokenizer has no chat template; use generate with plain prompts"
            )
        ids = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return self.encode(ids)

    def sampling_params(
        self, params: SamplingParams | None, options: Mapping[str, Any]
    ) -> SamplingParams:
        """The parameters given whole or as single options, if the mode allows them.

        Raises:
            ConfigError: both were given, an option is unknown or out of range, or the unit of
                protection does not count what it does.
        """
        chosen = sampling_params(params, options)
        if chosen.repetition_penalty != 1 and self.privacy is not None:
            self.privacy.check_choice("repetition_penalty")
        return chosen

    def submit(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Pending[list[Completion]]:
        """Begin to answer prompts of any lengths together; `result()` or `await` the answers.

        `options` are fields of `SamplingParams`.
        """
        chosen = self.sampling_params(params, options)
        requests = [self._request(prompt, chosen) for prompt in prompts]
        if not requests:
            raise RequestError("there is no prompt; give at least one")
        return self._background.start(self._answer(requests))

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Completion:
        """Answer one prompt; see `submit` for several."""
        return self.submit([prompt], params, **options).result()[0]

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Stream[str, Completion]:
        """Answer one prompt piece by piece; iterate with `for` or `async for`.

        Raises:
            RequestError: more than one sample was asked for.
        """
        chosen = self.sampling_params(params, options)
        if chosen.n != 1:
            raise RequestError(f"a stream has one sample and n is {chosen.n}; use submit")
        request = self._request(prompt, chosen)

        async def answer(feed: Feed[str]) -> Completion:
            heard = replace(request, on_text=feed.put, progress=progress)
            return (await self._answer([heard]))[0]

        return streamed(self._background, answer)

    def close(self) -> None:
        """Disconnect; answers under way end with an error."""
        if self._closed:
            return
        self._closed = True
        self._background.stop(self._split.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        substitution = self.new_substitution()
        ids = self.encode(substituted(prompt, substitution))
        return Request(ids, params, substitution=substitution)

    def new_substitution(self) -> Substitution | None:
        """A mapping of placeholders for one prompt, session or chat; None when none are used."""
        return None if self._placeholders is None else self._placeholders.session()

    async def _answer(self, requests: Sequence[Request]) -> list[Completion]:
        capacities = [r.capacity for r in requests for _ in range(r.params.n)]
        session = await self._split.open(capacities)
        try:
            return await together(
                complete(session, r, self._tokenizer, self._eos_ids) for r in requests
            )
        finally:
            await session.close()


def streamed(
    background: Background, produce: Callable[[Feed[str]], Coroutine[Any, Any, Completion]]
) -> Stream[str, Completion]:
    """Run a producer of text on the client's loop and hand out its stream."""
    feed: Feed[str] = Feed()
    summary: Future[Completion] = Future()
    unwanted = False

    def fail(error: BaseException) -> None:
        feed.fail(error)
        summary.set_exception(error)

    async def run() -> None:
        try:
            completion = await produce(feed)
        except asyncio.CancelledError:
            if not unwanted:
                fail(RequestError("this client was closed before the answer was complete"))
                return
            feed.end()
            summary.cancel()
        except BaseException as error:
            fail(error)
            raise
        else:
            feed.end()
            summary.set_result(completion)

    work = background.start(run())

    def cancel() -> None:
        nonlocal unwanted
        unwanted = True
        work.cancel()

    return Stream(feed, summary, cancel)


def substituted(
    prompt: str | Sequence[int], substitution: Substitution | None
) -> str | Sequence[int]:
    """The prompt with placeholders, if they are in use.

    Raises:
        RequestError: the prompt is token ids, in which nothing can be found.
    """
    if substitution is None:
        return prompt
    if not isinstance(prompt, str):
        raise RequestError("placeholders need text and the prompt is token ids; give the text")
    return substitution.substitute(prompt)


def eos_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """Ids that end a text, from the generation configuration or the model's."""
    declared = getattr(checkpoint.config, "eos_token_id", None)
    if (checkpoint.folder / GENERATION_CONFIG_NAME).exists():
        generation = GenerationConfig.from_pretrained(checkpoint.folder)
        declared = declared if generation.eos_token_id is None else generation.eos_token_id
    if declared is None:
        return frozenset()
    return frozenset([declared] if isinstance(declared, int) else declared)


def sampling_params(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """The parameters given whole or as single options.

    Raises:
        ConfigError: both were given, or an option is unknown or out of range.
    """
    if params is not None and options:
        raise ConfigError("give either params or single options, not both")
    return params if params is not None else SamplingParams.from_mapping(options)


def _cut(checkpoint: Checkpoint, partition: Partition) -> Cut:
    return Cut(checkpoint.fingerprint(), checkpoint.hidden_size, partition.bottom, partition.top)


def check_unicode(text: str) -> None:
    """Refuse what no tokenizer takes: text that was read from bytes of another encoding.

    Raises:
        RequestError: the text has lone surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("the text is not valid UTF-8; convert it, then ask again") from None


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        CheckpointError: there is none that can be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer that can be read; add tokenizer.json to its folder"
        ) from error
    return tokenizer
