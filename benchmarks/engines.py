"""Three ways to the same tokens: `transformers`, our engine in one process, our engine split."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from benchmarks import checkpoints
from fedsea.client.generation import TextWriter, continue_sample
from fedsea.client.llm import LLM
from fedsea.client.sampling import Sampler, SamplingParams
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import Placement, load_bottom, load_top, load_trunk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KV_ROWS = 8192
_COUNTED_TOKENS = 8

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Run:
    """One generation: seconds to the first token, seconds for all later ones, and the tokens."""

    first_token: float
    decode: float
    tokens: tuple[tuple[int, ...], ...]

    @property
    def later_tokens(self) -> int:
        """Tokens after the first, of all answers together."""
        return sum(len(answer) - 1 for answer in self.tokens)

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return self.later_tokens / self.decode

    @property
    def total_rate(self) -> float:
        """Tokens per second with the prompt's time."""
        return sum(map(len, self.tokens)) / (self.first_token + self.decode)


class _Times(BaseStreamer):
    """Notes when tokens appear; the first entry is the prompt."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002 - the streamer's interface
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


class Whole:
    """The unsplit model in `transformers`, greedy, with its own cache."""

    def __init__(self, model: Path) -> None:
        transformers_logging.disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None

    def generate(self, prompts: Prompts, new_tokens: int) -> Run:
        """Continue prompts of equal lengths."""
        ids = torch.tensor([list(prompt) for prompt in prompts])
        times = _Times()
        began = time.perf_counter()
        grown = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=times,
        )
        answers = tuple(tuple(answer) for answer in grown[:, ids.shape[1] :].tolist())
        return Run(times.at[1] - began, times.at[-1] - times.at[1], answers)


class Unsplit:
    """Bottom, trunk and top of our engine after each other in this process, without a wire."""

    def __init__(self, model: Path, dtype: str, quantization: str) -> None:
        checkpoint = Checkpoint.open(model)
        partition = checkpoints.partition_of(model)
        placement = Placement(dtype=DTYPES[dtype], quantization=quantization)
        self._top = load_top(checkpoint, partition.top_span(checkpoint.num_blocks), placement)
        spans = (
            load_bottom(checkpoint, partition.bottom_span(), placement),
            load_trunk(checkpoint, partition.trunk_span(checkpoint.num_blocks), placement),
            self._top.span,
        )
        self._runners = [SpanRunner(span, _KV_ROWS, placement) for span in spans]

    def generate(self, prompts: Prompts, new_tokens: int) -> Run:
        """Continue prompts greedily."""
        capacity = max(map(len, prompts)) + new_tokens
        pages = -(-capacity // self._runners[0].pool.page_rows)
        accounts = [
            runner.pool.open(len(prompts) * pages * runner.pool.page_rows)
            for runner in self._runners
        ]
        for runner, account in zip(self._runners, accounts, strict=True):
            for sequence in range(len(prompts)):
                runner.pool.begin(account, sequence, capacity)
        try:
            return self._generate(prompts, new_tokens, accounts)
        finally:
            for runner, account in zip(self._runners, accounts, strict=True):
                runner.pool.close(account)

    @torch.inference_mode()
    def _generate(self, prompts: Prompts, new_tokens: int, accounts: Sequence[int]) -> Run:
        began = time.perf_counter()
        tokens = [self._step([torch.tensor(list(prompt)) for prompt in prompts], accounts)]
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            tokens.append(self._step(list(tokens[-1].split(1)), accounts))
        ended = time.perf_counter()
        answers = tuple(tuple(answer) for answer in torch.stack(tokens, dim=1).tolist())
        return Run(first - began, ended - first, answers)

    def _step(self, entering: Sequence[Tensor], accounts: Sequence[int]) -> Tensor:
        rows = torch.cat(list(entering))
        for runner, account in zip(self._runners, accounts, strict=True):
            new = [NewRows(account, number, len(ids)) for number, ids in enumerate(entering)]
            rows = runner.run(rows, runner.advance(new))
        lasts = torch.tensor([len(ids) for ids in entering]).cumsum(0) - 1
        return self._top.logits(rows[lasts]).argmax(dim=-1)


class Split:
    """A client whose trunk is in another process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def generate(self, prompts: Prompts, new_tokens: int) -> Run:
        """Continue prompts greedily, all of them in one session."""
        return self.llm.background.run(self._generate(prompts, new_tokens))

    def first_token(self, prompt: Sequence[int]) -> float:
        """Seconds from the call to the first token, the opening of the session included."""
        times: list[float] = []

        def note(done: int, count: int) -> None:
            if done == count:
                times.append(time.perf_counter())

        began = time.perf_counter()
        self.llm.stream(prompt, progress=note, max_new_tokens=1, ignore_eos=True).result()
        return times[0] - began

    def bytes_of_a_prompt(self, prompt: Sequence[int]) -> float:
        """Bytes of the messages in both directions for a session with a prompt and one token."""
        return self.llm.background.run(self._bytes(prompt))[0]

    def bytes_of_a_token(self, prompt: Sequence[int]) -> float:
        """Bytes of the messages in both directions for each token after the first."""
        return self.llm.background.run(self._bytes(prompt))[1]

    async def _bytes(self, prompt: Sequence[int]) -> tuple[float, float]:
        session = await self.llm.split.open([len(prompt) + _COUNTED_TOKENS])
        try:
            sequence = session.begin(len(prompt) + _COUNTED_TOKENS)
            await session.feed(sequence, torch.tensor(list(prompt)))
            first = session.traffic.bytes_up + session.traffic.bytes_down
            for _ in range(_COUNTED_TOKENS):
                await session.feed(sequence, torch.tensor([prompt[0]]))
            last = session.traffic.bytes_up + session.traffic.bytes_down
        finally:
            await session.close()
        return float(first), (last - first) / _COUNTED_TOKENS

    async def _generate(self, prompts: Prompts, new_tokens: int) -> Run:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        began = time.perf_counter()
        session = await self.llm.split.open([len(prompt) + new_tokens for prompt in prompts])
        try:
            samplers = [Sampler(params, prompt, ()) for prompt in prompts]
            sequences = [session.begin(len(prompt) + new_tokens) for prompt in prompts]
            firsts = await asyncio.gather(
                *(
                    session.feed(sequence, torch.tensor(list(prompt)), sampler=sampler)
                    for sequence, prompt, sampler in zip(sequences, prompts, samplers, strict=True)
                )
            )
            first = time.perf_counter()
            samples = await asyncio.gather(
                *(
                    continue_sample(
                        session,
                        sequence,
                        sampler,
                        result.token or 0,
                        TextWriter(self.llm.tokenizer, (), None),
                    )
                    for sequence, sampler, result in zip(sequences, samplers, firsts, strict=True)
                )
            )
            ended = time.perf_counter()
        finally:
            await session.close()
        return Run(first - began, ended - first, tuple(sample.token_ids for sample in samples))
