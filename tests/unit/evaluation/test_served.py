"""What is trained and measured in one process is what client and server compute over the wire."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import memory_config

from fedsea.client.llm import LLM
from fedsea.client.protection import Protection
from fedsea.evaluation.denoiser_training import Recipe, train_denoiser
from fedsea.evaluation.frozen import FrozenModel
from fedsea.evaluation.projection_training import Recipe as ProjectionRecipe
from fedsea.evaluation.projection_training import train_projection
from fedsea.evaluation.public_text import PublicText
from fedsea.evaluation.releasing import Cut, seeded_noise
from fedsea.evaluation.training import Schedule
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.privacy.registry import mechanism_from_spec
from fedsea.server.service import TrunkService
from fedsea.transport.memory import MemoryChannel

WIDTH = 12
SPEC = "gaussian:clip_norm=2,mu=10"


@pytest.fixture
def files(tiny_model, tmp_path):
    """A trained projection as halves and a trained denoiser for it, and how they measure a text."""
    checkpoint = Checkpoint.open(tiny_model)
    ids = torch.randint(3, 20, (600,), generator=torch.Generator().manual_seed(0))
    text = PublicText.of(ids, [1], 13)
    schedule = Schedule(2)
    pair = train_projection(
        FrozenModel(checkpoint, Partition(1, 0)), text, ProjectionRecipe(WIDTH, schedule=schedule)
    ).projection
    model = FrozenModel(checkpoint, Partition(1, 1))
    cut = Cut(text.prefix, mechanism_from_spec(SPEC), pair)
    recipe = Recipe(16, 1, 2, 4, schedule)
    denoiser = train_denoiser(model, text, recipe, cut).denoiser
    pair.for_client().save(tmp_path / "encoder")
    pair.for_server().save(tmp_path / "decoder")
    denoiser.save(tmp_path / "denoiser")
    window = text.held_out[:1]
    with torch.inference_mode():
        clean = model.rows(window)
        narrow = cut.narrow(clean)
        released = cut.release(narrow, seeded_noise(0, 0))
        noisy = model.outputs(cut.widen(released))
        restored = denoiser(noisy, clean, released - narrow)
        expected = {True: model.logits(restored)[0], False: model.logits(noisy)[0]}
    return tmp_path, window[0], expected


@pytest.mark.parametrize("denoised", [True, False])
@pytest.mark.parametrize("chunks", [[13], [1, 5, 1, 1, 5]])
def test_the_wire_changes_nothing(tiny_model, files, denoised, chunks):
    """Logits of a text through encoder, server's decoder, trunk, denoiser and top, in any pieces."""
    folder, ids, expected = files
    service = TrunkService.load(
        memory_config(tiny_model, model={"projections": [str(folder / "decoder")]})
    )
    llm = LLM.connect(
        tiny_model,
        {"memory": lambda: MemoryChannel(service)},
        partition=(1, 1),
        dtype="fp32",
        codec="fp32",
        privacy=Protection(
            mechanism=SPEC,
            ledger=folder / "ledger",
            projection=folder / "encoder",
            denoiser=folder / "denoiser" if denoised else None,
            noise=seeded_noise(0, 0),
        ),
    )

    async def read():
        session = await llm.split.open([len(ids)])
        sequence = session.begin(len(ids))
        parts = [
            await session.feed(sequence, piece, keep=len(piece)) for piece in ids.split(chunks)
        ]
        await session.close()
        return torch.cat([part.logits for part in parts])

    try:
        llm.background.run(service.__aenter__())
        found = llm.background.run(read())
        assert torch.allclose(found, expected[denoised], atol=2e-3)
        assert not torch.allclose(found, expected[not denoised], atol=2e-2)
    finally:
        llm.background.run(service.__aexit__(None, None, None))
        llm.close()
