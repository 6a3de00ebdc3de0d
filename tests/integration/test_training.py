"""Training through a server process over mutual TLS: equal to PEFT on the unsplit model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.conftest import character_tokenizer
from tests.integration.conftest import ServerProcess, Start, processes, tls_of
from tests.tiny_models import save_tiny
from tests.unsplit_training import (
    assert_equal_gradients,
    examples_of,
    factors,
    gradients,
    padded,
    saved_gradients,
    unsplit,
)
from transformers import AutoModelForCausalLM

from fedsea.client.training import SplitForTraining
from fedsea.errors import ConnectionLost, PromptTooLong
from fedsea.model.adapters import read_adapter, write_adapter
from fedsea.model.lora import LoraConfig
from fedsea.model.optimization import AdamWConfig
from fedsea.model.partition import Span

LORA = LoraConfig(rank=4, alpha=12.0)
LENGTHS = (7, 30, 1, 18)
NUM_BLOCKS = 5


class Training:
    """A server process that trains, and its clients of the tiny model."""

    def __init__(self, start: Start, model: Path, certificates: Path, folder: Path) -> None:
        self._start = start
        self._model = model
        self._certificates = certificates
        self.folder = folder
        self.server = self.start()

    def start(self, *options: str) -> ServerProcess:
        """Another server of the same folder."""
        return self._start("--set", f"training.folder={self.folder}", *options)

    def connect(self, **options: Any) -> SplitForTraining:
        """A client of the tenant acme."""
        return SplitForTraining.connect(
            self._model,
            self.server.address,
            **{"name": "run", "lora": LORA, "tls": tls_of(self._certificates, "acme"), **options},
        )

    def saved(self, step: int, name: str = "run") -> Path:
        """The folder of a step of acme's."""
        return self.folder / "acme" / name / f"step-{step:08d}"


@pytest.fixture
def training(start_server: Start, tiny_model: Path, certificates: Path, tmp_path: Path) -> Training:
    """A server that trains."""
    return Training(start_server, tiny_model, certificates, tmp_path / "runs")


def test_gradients_are_those_of_the_unsplit_model(training: Training, tiny_model: Path) -> None:
    """Logits, losses and every factor's gradient over two accumulated padded batches, five cuts."""
    batches = [padded(examples_of(LENGTHS)), padded(examples_of((3, 4), seed=2))]
    for partition in ((1, 1), (0, 0), (2, 2), (0, 3), (3, 0)):
        span = Span(partition[0], NUM_BLOCKS - partition[1])
        name = f"cut-{span.first}-{span.end}"
        optimizer = AdamWConfig(betas=(0.0, 0.9))
        with training.connect(partition=partition, optimizer=optimizer, name=name) as model:
            model.eval()  # so that logits come beside the loss
            model.save()
            trunk = read_adapter(training.saved(0, name), span)
            whole = unsplit(tiny_model, [*model.adapters(), trunk], LORA)
            for ids, mask, labels in batches:
                expected = whole(ids, attention_mask=mask, labels=labels)
                found = model(ids, mask, labels)
                assert found.loss is not None
                assert found.logits is not None
                (expected.loss / 2).backward()
                (found.loss / 2).backward()
                torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
                real, largest = mask != 0, float(expected.logits.detach().abs().max())
                torch.testing.assert_close(
                    found.logits[real], expected.logits[real], rtol=1e-5, atol=1e-5 * largest
                )
            model.step(1e-3)
            model.save()
        saved = saved_gradients(training.saved(1, name), span)
        assert_equal_gradients(gradients(model.adapters()) | saved, whole)


def test_losses_agree_after_two_hundred_steps(training: Training, tiny_model: Path) -> None:
    """The course of a whole training, to a thousandth; a step takes its rows and less than a KiB."""
    data = [padded(examples_of([8, 12, 5], seed=seed)) for seed in range(4)]
    with training.connect() as model:
        model.save()
        trunk = read_adapter(training.saved(0), Span(1, NUM_BLOCKS - 1))
        whole = unsplit(tiny_model, [*model.adapters(), trunk], LORA)
        ours = torch.optim.AdamW(model.parameters(), lr=5e-4)
        theirs = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=5e-4)
        losses = []
        for step in range(200):
            ids, mask, labels = data[step % len(data)]
            before = replace(model.traffic)
            found = model(ids, mask, labels).loss
            expected = whole(ids, attention_mask=mask, labels=labels).loss
            assert found is not None
            losses.append((float(found.detach()), float(expected.detach())))
            for loss, optimizer in ((found, ours), (expected, theirs)):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert model.step(5e-4).applied
            used = model.traffic.since(before)
            payload = 4 * 25 * 48 * 4
            assert payload <= used.bytes_up + used.bytes_down < payload + 1024

    assert losses[-1][0] < 0.5 * losses[0][0]
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-3)


def test_an_example_larger_than_a_usual_message(certificates: Path, tmp_path: Path) -> None:
    """Its rows travel in one message, whose size the server derives from its context."""
    wide = save_tiny(
        "llama",
        tmp_path / "wide",
        hidden_size=1024,
        num_hidden_layers=3,
        max_position_embeddings=3072,
        initializer_range=0.02,
    )
    character_tokenizer().save_pretrained(wide)
    with processes(wide, certificates, tmp_path) as start:
        training = Training(start, wide, certificates, tmp_path / "runs")
        ids, mask, labels = padded(examples_of((2060,)))
        with training.connect(optimizer=AdamWConfig(betas=(0.0, 0.9))) as model:
            model.save()
            trunk = read_adapter(training.saved(0), Span(1, 2))
            whole = unsplit(wide, [*model.adapters(), trunk], LORA)
            expected = whole(ids, attention_mask=mask, labels=labels).loss
            found = model(ids, mask, labels).loss
            assert found is not None
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            found.backward()
            expected.backward()
            assert model.step(1e-3).applied
            model.save()
            saved = saved_gradients(training.saved(1), Span(1, 2))
            assert_equal_gradients(gradients(model.adapters()) | saved, whole)
            with pytest.raises(PromptTooLong, match="3073 rows does not fit"):
                model.logits([torch.zeros(3073, dtype=torch.long)])


def test_bf16_all_the_way(training: Training) -> None:
    """Client and server in bf16: half the bytes, factors in fp32, and it learns."""
    training.server.close()
    training.server = training.start("--dtype", "bf16")
    ids, mask, labels = padded(examples_of(LENGTHS))
    with training.connect(dtype="bf16") as model:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses = []
        for _ in range(20):
            before = replace(model.traffic)
            loss = model(ids, mask, labels).loss
            assert loss is not None
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.step(5e-3)
            used = model.traffic.since(before)
            payload = 4 * sum(LENGTHS) * 48 * 2
            assert payload <= used.bytes_up + used.bytes_down < payload + 1024
        assert losses[-1] < 0.7 * losses[0]
        assert all(one.dtype is torch.float32 for one in model.parameters())


def test_a_killed_server_goes_on_from_what_it_saved(training: Training) -> None:
    """kill -9 in the middle of a step; the course goes on as if nothing had happened."""
    batches = [padded(examples_of(LENGTHS, seed=seed)) for seed in range(6)]

    def step(model: SplitForTraining, optimizer: torch.optim.Optimizer, number: int) -> float:
        optimizer.zero_grad()
        loss = model(*batches[number]).loss
        assert loss is not None
        loss.backward()
        model.step(1e-2)
        optimizer.step()
        return float(loss.detach())

    with training.connect(name="calm") as model:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        calm = [step(model, optimizer, number) for number in range(6)]
        model.save()
        expected = dict(factors([read_adapter(training.saved(6, "calm"), Span(1, 4))]))
    with training.connect() as model:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = [step(model, optimizer, number) for number in range(3)]
        model.save()
        loss = model(*batches[3]).loss
        assert loss is not None
        address = training.server.address
        training.server.kill()
        with pytest.raises(ConnectionLost):
            loss.backward()
        training.server = training.start("--address", address)
        assert training.server.address == address
        assert model.reopen((3,)) == 3
        found += [step(model, optimizer, number) for number in range(3, 6)]
        model.save()

    assert found == calm
    trunk = dict(factors([read_adapter(training.saved(6), Span(1, 4))]))
    assert all(torch.equal(trunk[name], expected[name]) for name in expected)


def test_the_parts_together_are_an_adapter_of_peft(
    training: Training, tiny_model: Path, tmp_path: Path
) -> None:
    """The client's part and the one that the server saved give PEFT the logits of the split."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with training.connect() as model:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss = model(ids, mask, labels).loss
            assert loss is not None
            loss.backward()
            model.step(1e-2)
            optimizer.step()
            optimizer.zero_grad()
        model.save()
        with torch.no_grad():
            expected = model.eval()(ids, mask).logits
        trunk = read_adapter(training.saved(3), Span(1, NUM_BLOCKS - 1))
        write_adapter(tmp_path / "whole", [*model.adapters(), trunk], "tiny")

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    whole = PeftModel.from_pretrained(base, str(tmp_path / "whole")).eval()
    assert expected is not None
    real = mask != 0
    with torch.no_grad():
        found = whole(ids, attention_mask=mask).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_model)(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[real], expected[real], atol=1e-2)
