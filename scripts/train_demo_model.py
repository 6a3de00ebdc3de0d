"""Trains the packaged demo model from nothing but `scripts.demo_notes`.

Owns the recipe: tokenizer, chat template, model shape, optimisation, and the record of how the
training went (`training.json`, written beside the weights). From the repository's root:

    python -m scripts.train_demo_model --out DIR

The text, the order of the batches and the first weights follow from the seed; the result is equal
bit for bit on one machine with one thread, and up to rounding elsewhere.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
import transformers
from scripts.demo_notes import Document, document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedsea.demo import CHAT_PROMPT, PROMPTS

PAD: Final = "<pad>"
BOS: Final = "<s>"
EOS: Final = "</s>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
SPECIAL_TOKENS: Final = (PAD, BOS, EOS, USER, ASSISTANT)
"""Their ids are their places in this list."""

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}"
    + ASSISTANT
    + "{{ message['content'] | trim }}{{ eos_token }}"
    "{% else %}"
    "{{ raise_exception('the demo model knows only the roles user and assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the training with one shape of its batches: rows of so many tokens."""

    share: float
    rows: int
    row_length: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the trained weights depend on, apart from the grammar itself."""

    steps: int
    seed: int = 20311
    held_out_seed: int = 77003
    held_out_documents: int = 100
    vocabulary: int = 1024
    tokenizer_documents: int = 5000
    hidden_size: int = 128
    blocks: int = 8
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 344
    longest: int = 1024
    initializer_range: float = 0.04
    peak_learning_rate: float = 1e-2
    last_learning_rate: float = 1e-4
    warmup_steps: int = 60
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    largest_gradient: float = 1.0
    drill_share: float = 0.12
    phases: tuple[Phase, ...] = (
        Phase(0.75, 8, 256),
        Phase(0.17, 4, 512),
        Phase(0.08, 2, 1024),
    )

    def phase(self, step: int) -> Phase:
        """The phase of `step`: short rows first, which learn faster per second."""
        end = 0.0
        for phase in self.phases:
            end += phase.share
            if step < end * self.steps:
                return phase
        return self.phases[-1]

    def drills(self, step: int) -> int:
        """How many of the rows at `step` are drills in copying: half of them, early on."""
        return self.phase(step).rows // 2 if step < self.drill_share * self.steps else 0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from the peak to the last rate."""
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        drop = 0.5 * (1 + math.cos(math.pi * done))
        return self.last_learning_rate + (self.peak_learning_rate - self.last_learning_rate) * drop


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """How well documents that were not trained on are predicted, in nats per token.

    `grammar` is the information of the choices behind the documents, the most that they hold: a
    model at or below it has learned the grammar.
    """

    model: float
    grammar: float
    tokens: int


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the grammar's text; each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    samples = (document(recipe.seed, index) for index in range(recipe.tokenizer_documents))
    tokenizer.train_from_iterator((sample.whole_text for sample in samples), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.longest,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, sample: Document) -> list[int]:
    """The token ids of a sample, from BOS to EOS."""
    if not sample.turns:
        return [*tokenizer.encode(sample.text), tokenizer.eos_token_id]
    messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def training_rows(tokenizer: Any, recipe: Recipe) -> Iterator[list[list[int]]]:
    """The batch of every step.

    A row begins with a document, as a prompt does, and goes on with the next ones until it is full;
    what is over is left out.
    """
    stream = _encoded_documents(tokenizer, recipe.seed)
    chance = random.Random(f"drills {recipe.seed}")
    for step in range(recipe.steps):
        phase = recipe.phase(step)
        drills = recipe.drills(step)
        rows = [_drill(chance, recipe.vocabulary, phase.row_length) for _ in range(drills)]
        rows += [_filled_row(stream, phase.row_length) for _ in range(phase.rows - drills)]
        yield rows


def _encoded_documents(tokenizer: Any, seed: int) -> Iterator[list[int]]:
    return (encode(tokenizer, document(seed, index)) for index in itertools.count())


def _filled_row(stream: Iterator[list[int]], length: int) -> list[int]:
    row: list[int] = []
    while len(row) < length:
        row += next(stream)
    return row[:length]


def _drill(chance: random.Random, vocabulary: int, length: int) -> list[int]:
    """Random tokens that repeat: the shortest way to learn to copy from further up."""
    period = chance.randint(8, length // 2)
    ids = [chance.randrange(len(SPECIAL_TOKENS), vocabulary) for _ in range(period)]
    return list(itertools.islice(itertools.cycle(ids), length))


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """The model with its first weights, in float32."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.longest,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    return LlamaForCausalLM(config)


def train(model: Any, tokenizer: Any, recipe: Recipe) -> list[float]:
    """Trains `model` in place and returns the loss of every step, in nats per token."""
    optimizers = _optimizers(model, recipe)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step, rows in enumerate(training_rows(tokenizer, recipe)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = _mean_loss(model, torch.tensor(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.largest_gradient)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == recipe.steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step:5d}  loss {losses[-1]:.4f}  {seconds:7.1f} s", flush=True)
    model.eval()
    return losses


def _optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the weights of the norms."""
    named = list(model.named_parameters())
    matrices = [each for name, each in named if each.dim() == 2 and "embed" not in name]
    embedding = [each for name, each in named if "embed" in name]
    norms = [each for _, each in named if each.dim() == 1]
    muon = torch.optim.Muon(
        matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": embedding, "weight_decay": recipe.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=recipe.betas,
    )
    return [muon, adamw]


def _mean_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every token but the first of each row; `ids` is [rows, length]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Any, seed: int, documents: int) -> HeldOutLoss:
    """The loss on the first documents of `seed`, each on its own from BOS to EOS."""
    total = nats = 0.0
    tokens = 0
    for index in range(documents):
        sample = document(seed, index)
        ids = torch.tensor([encode(tokenizer, sample)])
        predicted = ids.shape[1] - 1
        total += _mean_loss(model, ids).item() * predicted
        nats += sample.nats
        tokens += predicted
    return HeldOutLoss(model=total / tokens, grammar=nats / tokens, tokens=tokens)


@torch.inference_mode()
def greedy(model: Any, ids: list[int], longest: int = 400) -> list[int]:
    """What the model goes on with after `ids` when it takes the likeliest token each time."""
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=longest,
    )
    new: list[int] = made[0, len(ids) :].tolist()
    return new


def samples(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Greedy text for the fixed prompts and the fixed chat question."""
    found = []
    for prompt in PROMPTS:
        new = greedy(model, tokenizer.encode(prompt))
        found.append({"prompt": prompt, "text": tokenizer.decode(new, skip_special_tokens=True)})
    messages = [{"role": "user", "content": CHAT_PROMPT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    new = greedy(model, tokenizer.encode(text, add_special_tokens=False))
    found.append({"chat": CHAT_PROMPT, "text": tokenizer.decode(new, skip_special_tokens=True)})
    return found


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes a checkpoint whose tensors are bfloat16 and which loads, and computes, as float32."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    config_file = out / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def curve(losses: list[float], points: int = 40) -> list[dict[str, float]]:
    """The losses as at most `points` means over equal stretches of steps."""
    width = math.ceil(len(losses) / points)
    stretches = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [
        {
            "last_step": min((place + 1) * width, len(losses)) - 1,
            "loss": round(sum(stretch) / len(stretch), 4),
        }
        for place, stretch in enumerate(stretches)
    ]


def record(
    model: Any, tokenizer: Any, recipe: Recipe, losses: list[float], seconds: float
) -> dict[str, Any]:
    """What `training.json` says; `model` is the saved checkpoint, loaded again."""
    last = losses[-50:]
    held_out = held_out_loss(model, tokenizer, recipe.held_out_seed, recipe.held_out_documents)
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": f"python -m scripts.train_demo_model --out DIR --steps {recipe.steps}",
        "recipe": asdict(recipe),
        "parameters": sum(each.numel() for each in model.parameters()),
        "trained_tokens": sum(
            phase.rows * phase.row_length for phase in map(recipe.phase, range(recipe.steps))
        ),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "loss": {
            "unit": "nats per token",
            "train": round(sum(last) / len(last), 4),
            "held_out": round(held_out.model, 5),
            "held_out_tokens": held_out.tokens,
            "grammar_entropy": round(held_out.grammar, 4),
        },
        "curve": curve(losses),
        "samples": samples(model, tokenizer),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def main() -> None:
    """Trains, saves, loads again, measures and records."""
    parser = argparse.ArgumentParser(description="Train the packaged demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help="steps of 2,048 tokens each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 repeats exactly")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(steps=options.steps)
    started = time.monotonic()
    tokenizer = train_tokenizer(recipe)
    model = new_model(recipe)
    losses = train(model, tokenizer, recipe)
    seconds = time.monotonic() - started
    save(model, tokenizer, options.out)
    saved = AutoModelForCausalLM.from_pretrained(options.out, dtype="auto")
    report = record(saved, tokenizer, recipe, losses, seconds)
    text = json.dumps(report, indent=2) + "\n"
    (options.out / "training.json").write_text(text, encoding="utf-8")
    print(json.dumps(report["loss"]))


if __name__ == "__main__":
    main()
