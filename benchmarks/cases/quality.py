"""What weight formats and codecs cost in quality, on pretrained models and text they know.

The text is TinyStories' validation set; texts and models are skipped where they are absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks import checkpoints
from benchmarks.bench import Bench
from benchmarks.measure import Row, Spread
from fedsea.evaluation.utility import Reading, read, utility
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.spans import Placement, load_bottom, load_top, load_trunk
from fedsea.wire.codecs import Codec, decode, encode

CASE = "quality"
_NF4_BLOCK = 64
_TEXTS = 40
_TOKENS = 200
_CHARACTERS = 8  # of a token, at most on average

Wire = Callable[[Tensor], Tensor]


def rows(bench: Bench) -> list[Row]:
    """Weight formats on all parts, and codecs at both cuts, against fp32."""
    stories = checkpoints.stories()
    if stories is None:
        return []
    found = []
    for name, model in checkpoints.pretrained().items():
        bench.say(f"quality of formats, {name}")
        texts = _texts(model, stories)
        clean = _readings(model, texts, "none", _as_is)
        for label, quantization, wire in _formats(model):
            readings = _readings(model, texts, quantization, wire)
            found += _rows(f"{name}, {label}", readings, clean)
    return found


def _formats(model: Path) -> list[tuple[str, str, Wire]]:
    found: list[tuple[str, str, Wire]] = [
        ("fp32", "none", _as_is),
        ("int8 weights", "int8", _as_is),
    ]
    config = Checkpoint.open(model).config
    # bitsandbytes scales numbers in blocks of this size and packs as many columns on the CPU.
    in_blocks = not (config.hidden_size % _NF4_BLOCK or config.intermediate_size % _NF4_BLOCK)
    if in_blocks and find_spec("bitsandbytes") is not None:
        found.append(("nf4 weights", "nf4", _as_is))
    return found + [
        (f"codec {codec.value}", "none", _through(codec))
        for codec in (Codec.BF16, Codec.FP16, Codec.INT8)
    ]


def _as_is(hidden: Tensor) -> Tensor:
    return hidden


def _through(codec: Codec) -> Wire:
    def there(hidden: Tensor) -> Tensor:
        return decode(encode(hidden, codec), codec, hidden.shape[0], hidden.shape[1])

    return there


def _texts(model: Path, stories: Path) -> list[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = stories.read_text(encoding="utf-8")[: _TEXTS * _TOKENS * _CHARACTERS]
    ids = tokenizer(text, verbose=False).input_ids  # longer than a context before it is cut
    return list(torch.tensor(ids).split(_TOKENS))[:_TEXTS]


@torch.inference_mode()
def _readings(model: Path, texts: Sequence[Tensor], quantization: str, wire: Wire) -> list[Reading]:
    checkpoint, partition = Checkpoint.open(model), checkpoints.partition_of(model)
    placement = Placement(quantization=quantization)
    blocks = checkpoint.num_blocks
    bottom = load_bottom(checkpoint, partition.bottom_span(), placement)
    trunk = load_trunk(checkpoint, partition.trunk_span(blocks), placement)
    top = load_top(checkpoint, partition.top_span(blocks), placement)
    found = []
    for ids in texts:
        batch = RaggedBatch.whole([len(ids)], ids.device)
        hidden = wire(trunk.run(wire(bottom.run(ids, batch)), batch))
        found.append(read(top.run(hidden, batch, torch.arange(len(ids))), ids))
    return found


def _rows(label: str, readings: Sequence[Reading], clean: Sequence[Reading]) -> list[Row]:
    measured = utility(readings, clean)
    note = f"{len(readings)} texts of at most {_TOKENS} tokens"
    return [
        Row(
            case=CASE,
            name=f"{label}: perplexity",
            unit="ppl",
            spread=Spread.of([measured.perplexity]),
            note=note,
        ),
        Row(
            case=CASE,
            name=f"{label}: same first-ranked token as fp32",
            unit="%",
            spread=Spread.of([100 * measured.agreement]),
            note=note,
        ),
    ]
