"""Options of `fedsea redteam --training`: attack fine-tuning instead of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.evaluation.training_suite import TrainingPlan

_TRAINING = "Training"
_DEFAULT_ATTACKS = ("r3", "r3t", "r7", "r8")


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """What is trained, and what protects its gradients."""

    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Attack fine-tuning: gradients, updates and the released adapter.",
            rich_help_panel=_TRAINING,
        ),
    ] = False
    gradients: Annotated[
        list[str] | None,
        typer.Option(
            help="What protects gradients; repeat it for several. With --mechanism, each pair too.",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None
    gradient_noise: Annotated[
        list[float] | None,
        typer.Option(
            help="Noise on gradients alone, in units of their size; repeat it for several.",
            show_default="1 and 4 where nothing else is given",
            rich_help_panel=_TRAINING,
        ),
    ] = None
    gradient_mu: Annotated[
        list[float] | None,
        typer.Option(
            help="Clipping and noise on gradients alone, by the mu of one example; repeat it for "
            "several.",
            show_default="8 where nothing else is given",
            rich_help_panel=_TRAINING,
        ),
    ] = None
    steps: Annotated[
        int, typer.Option(help="Steps of a run.", rich_help_panel=_TRAINING, min=1)
    ] = 30
    batch: Annotated[
        int, typer.Option(help="Texts of a step.", rich_help_panel=_TRAINING, min=1)
    ] = 4
    rank: Annotated[int, typer.Option(help="Of the adapter.", rich_help_panel=_TRAINING)] = 8
    learning_rate: Annotated[float, typer.Option(help="Constant.", rich_help_panel=_TRAINING)] = (
        2e-3
    )
    canaries: Annotated[
        int,
        typer.Option(
            help="Texts with a random secret, half of which are trained on.",
            rich_help_panel=_TRAINING,
            min=0,
        ),
    ] = 20


def plan_of(
    options: TrainingOptions,
    *,
    model: Path,
    bottom: int,
    top: int,
    text: Path,
    public: Path | None,
    texts: int,
    tokens: int,
    mechanisms: Sequence[str],
    attacks: str | None,
) -> TrainingPlan:
    """The plan of one model and cut.

    As many texts again as are attacked are trained on, where the file has them, and as many as are
    trained on are held out.

    Raises:
        ConfigError, RequestError, ModelError: an option that cannot be used.
    """
    from fedsea.client.examples import Example
    from fedsea.client.llm import load_tokenizer
    from fedsea.evaluation.texts import Texts, read_pieces, with_kinds
    from fedsea.evaluation.training_suite import TrainingData, TrainingPlan
    from fedsea.evaluation.training_victim import Guarded
    from fedsea.model.checkpoint import Checkpoint
    from fedsea.model.lora import LoraConfig
    from fedsea.model.partition import Partition
    from fedsea.privacy.registry import mechanism_from_spec

    checkpoint = Checkpoint.open(model)
    partition = Partition(bottom, top)
    partition.trunk_span(checkpoint.num_blocks)
    width = checkpoint.hidden_size
    rows = [mechanism_from_spec(spec, width=width) for spec in mechanisms]
    gradients = [mechanism_from_spec(spec, width=width) for spec in options.gradients or ()]
    guards = [
        *(Guarded(rows=each) for each in rows),
        *(Guarded(gradients=each) for each in gradients),
        *(Guarded(one, other) for one in rows for other in gradients),
    ]
    given = bool(guards or options.gradient_noise or options.gradient_mu)
    tokenizer = load_tokenizer(checkpoint)

    def encode(piece: str) -> list[int]:
        ids: list[int] = tokenizer(piece, verbose=False).input_ids
        return ids

    pieces = read_pieces(text, encode, tokens)
    known = () if public is None else read_pieces(public, encode, tokens)
    # Without a public file a third of the text is public.
    private = pieces if known else pieces[: 2 * len(pieces) // 3]
    known = known or pieces[len(private) :]
    half = min(2 * texts, len(private) // 2)
    if texts < 1 or half < max(texts, 2) or not known:
        raise ConfigError(
            f"{text} has {len(pieces)} texts of {tokens} tokens, too few to train on {max(texts, 2)}, "
            "to hold out as many, and to have some public; give more text, or fewer --texts"
        )
    names = [name.strip().lower() for name in (attacks or "").split(",") if name.strip()]
    if attacks is None:
        names = [name for name in _DEFAULT_ATTACKS if bottom or name != "r7"]
    batch = min(options.batch, texts)
    trained = with_kinds(Texts(private[:half], known, ()), tokenizer.convert_ids_to_tokens)
    return TrainingPlan(
        model=model,
        partition=partition,
        data=TrainingData(
            tuple(Example.of(ids) for ids in trained.secret),
            private[half : 2 * half],
            known,
            tuple(encode("")),
            # Nothing predicts the first token.
            tuple(kinds[1:] for kinds in trained.kinds),
        ),
        guards=tuple(guards),
        gradient_noise=tuple(options.gradient_noise or (() if given else (1.0, 4.0))),
        gradient_mu=tuple(options.gradient_mu or (() if given else (8.0,))),
        attacks=tuple(dict.fromkeys(names)),
        lora=LoraConfig(rank=options.rank),
        batch=batch,
        steps=max(options.steps, texts // batch),
        attacked=texts // batch,
        learning_rate=options.learning_rate,
        canaries=options.canaries,
        decode=lambda ids: str(tokenizer.decode(list(ids))),
    )


def check_alone(given: Sequence[str]) -> None:
    """Refuse what is about requests only.

    Raises:
        ConfigError: one of these options was given.
    """
    if given:
        raise ConfigError(f"{given[0]} is about requests: leave it out with --training")
