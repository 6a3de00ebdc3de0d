"""A whole fine-tuning as settings and one call: read examples, connect, train, keep the adapter.

`FinetuneConfig` is a TOML file with the sections `[run]`, `[parts]`, `[lora]`, `[data]` and
`[training]`. `Finetuning` does what it says: examples are read before anything is connected, and a
folder that holds the same run goes on with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsea.client.connecting import Servers, codec_of, placement_of
from fedsea.client.examples import (
    ExampleSet,
    LossOn,
    Paragraphs,
    ReadOptions,
    TooLong,
    read_examples,
    record_examples,
)
from fedsea.client.link import Patience, Tell
from fedsea.client.llm import load_tokenizer
from fedsea.client.trainer import MOST_OFFERED, Callback, Trainer
from fedsea.client.training import PARTS, SplitForTraining
from fedsea.client.training_config import SECTION, TrainerConfig
from fedsea.client.training_metrics import CsvMetrics, TensorBoardMetrics
from fedsea.client.training_protection import TrainingPolicy, TrainingProtection
from fedsea.client.training_run import CHECKPOINTS, Summary, ended_run
from fedsea.errors import ConfigError, DataError
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.checkpoints import Steps
from fedsea.model.lora import TARGETS, LoraConfig
from fedsea.model.partition import Partition
from fedsea.privacy.attestation import Verifier
from fedsea.settings import Table, check_keys, need, read_toml, section, table_at, with_model
from fedsea.tasks.catalogue import task
from fedsea.tasks.loading import load
from fedsea.tasks.records import Record, split, trainable
from fedsea.tasks.task import LORA_DROPOUT, LORA_TARGETS
from fedsea.transport.credentials import ClientTLS, Plaintext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")

Overrides = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """What is trained on what, and where the result goes.

    Attributes:
        model: folder of a checkpoint or a client bundle, or a hub id.
        data: file of examples to learn from.
        out: folder for the client's part of the adapter, its checkpoints and `metrics.csv`.
        name: of the trunk's part at the server; None for the name of `out`.
        evaluation: file of examples to evaluate on.
        evaluation_share: so large a part of `data` is for evaluation instead; 0 for none.
        tensorboard: whether metrics are written for TensorBoard too.
    """

    model: str
    data: Path
    out: Path
    name: str | None = None
    evaluation: Path | None = None
    evaluation_share: float = 0.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        need(bool(self.model), "run.model is empty; give the folder of a checkpoint")
        share = self.evaluation_share
        need(0 <= share < 1, f"run.evaluation_share is {share:g}; give a part of 1, such as 0.1")
        need(
            not (share and self.evaluation is not None),
            "run.evaluation and run.evaluation_share are both given; remove one of them",
        )
        need(
            _NAME.fullmatch(self.adapter) is not None,
            f"{self.adapter!r} cannot be the adapter's name at the server; give run.name of "
            "letters, digits, '.', '_' and '-'",
        )

    @property
    def adapter(self) -> str:
        """The name of the trunk's part at the server."""
        return self.out.resolve().name if self.name is None else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsSection:
    """What of the model is here, and how it is computed.

    Attributes:
        bottom: blocks after the embedding that stay here.
        top: blocks before the final norm that stay here.
        dtype: number format of the blocks here: `fp32`, `bf16`, `fp16`, or `auto` for the
            checkpoint's.
        codec: how rows travel: `fp32`, `bf16`, `fp16`, `int8`, or `auto` for that of the dtype.
        gradient_codec: how gradients travel, likewise.
        device: where the blocks here run: `cpu`, `cuda` or `mps`.
    """

    bottom: int = 1
    top: int = 1
    dtype: str = "auto"
    codec: str = "auto"
    gradient_codec: str = "auto"
    device: str = "cpu"

    @property
    def partition(self) -> Partition:
        """The cut."""
        return Partition(self.bottom, self.top)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSection:
    """What the adapter changes.

    Attributes:
        rank: rows of A.
        alpha: what is added is scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora`.
        dropout: on the input of A.
        targets: names of the linears.
        blocks: numbers of the blocks in the whole model; None for all.
        rslora: rank-stabilized scaling.
        freeze_a: only B is trained (FFA-LoRA).
        train: parts that have an adapter: `bottom`, `trunk`, `top`.
        prompt_rows: virtual tokens at the entrance of the trunk, trained at the server as well.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    blocks: tuple[int, ...] | None = None
    rslora: bool = False
    freeze_a: bool = False
    train: tuple[str, ...] = PARTS
    prompt_rows: int = 0

    def __post_init__(self) -> None:
        _ = self.config
        unknown = sorted(set(self.train) - set(PARTS))
        need(not unknown, f"lora.train names {', '.join(unknown)}; use {', '.join(PARTS)}")
        need(self.prompt_rows >= 0, f"lora.prompt_rows is {self.prompt_rows}; give 0 or more")
        need(
            bool(self.train) or self.prompt_rows > 0,
            "lora.train is empty and there is no soft prompt; name what shall be trained",
        )

    @property
    def config(self) -> LoraConfig:
        """The same for the model."""
        return LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
            blocks=self.blocks,
            rslora=self.rslora,
            freeze_a=self.freeze_a,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """How files become examples.

    Attributes:
        loss_on: `answer` for completions and the assistant's turns, `all` for every token.
        max_tokens: most tokens of one example; None for as many as it has.
        too_long: longer ones are left out by `skip`. With `cut`, the front of a prompt that has one
            completion is left out, and the end of everything else.
        paragraphs: a paragraph of a text file is an example with `single`; with `packed`, windows of
            `max_tokens` tokens are.
        end_of_text: whether completions and paragraphs end with the end-of-text token.
        task: the files are those of this task; empty for files of examples. What it says about
            `lora.rank`, `lora.alpha`, `lora.dropout`, `lora.targets`, `data.max_tokens` and
            `training.learning_rate` holds where nothing else is given.
        style: which of the task's templates; empty for the first one.
        templates: TOML file that changes the task's templates or adds some.
        limit: most records of each of its files; None for all.
        draw: seed of which ones.
    """

    loss_on: LossOn = LossOn.ANSWER
    max_tokens: int | None = None
    too_long: TooLong = TooLong.SKIP
    paragraphs: Paragraphs = Paragraphs.SINGLE
    end_of_text: bool = True
    task: str = ""
    style: str = ""
    templates: Path | None = None
    limit: int | None = None
    draw: int = 0

    def __post_init__(self) -> None:
        _ = self.options
        given = {"style": self.style, "templates": self.templates, "limit": self.limit}
        unused = [key for key, value in given.items() if value] if not self.task else []
        for key in unused:
            raise ConfigError(f"data.{key} is given without data.task; name the task")
        if self.task:
            task(self.task)

    @property
    def options(self) -> ReadOptions:
        """The same for the reader."""
        return ReadOptions(
            loss_on=self.loss_on,
            max_tokens=self.max_tokens,
            too_long=self.too_long,
            paragraphs=self.paragraphs,
            end_of_text=self.end_of_text,
        )

    def records(self, path: Path) -> list[Record]:
        """The records of a file of the task.

        Raises:
            ConfigError, DataError: as `fedsea.tasks.loading.load`.
        """
        return load(
            self.task,
            path,
            limit=self.limit,
            seed=self.draw,
            style=self.style,
            overrides=self.templates,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """All settings of a fine-tuning."""

    run: RunSection
    parts: PartsSection = field(default_factory=PartsSection)
    lora: LoraSection = field(default_factory=LoraSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainerConfig = field(default_factory=TrainerConfig)

    @classmethod
    def load(cls, path: str | Path, overrides: Overrides | None = None) -> FinetuneConfig:
        """Read a TOML file; `overrides` replaces single keys of its sections.

        Raises:
            ConfigError: the file cannot be read, or a key or value in it cannot be used.
        """
        path = Path(path)
        return cls.from_table(read_toml(path), overrides, base=path.parent)

    @classmethod
    def from_table(
        cls, table: Table, overrides: Overrides | None = None, base: Path | None = None
    ) -> FinetuneConfig:
        """Settings out of nested tables, as in a TOML file; paths are relative to `base`.

        Overrides are not: they come from a command line, where paths are relative to its folder.

        Raises:
            ConfigError: a key or value cannot be used.
        """
        kinds: dict[str, type[Any]] = {
            "run": RunSection,
            "parts": PartsSection,
            "lora": LoraSection,
            "data": DataSection,
            SECTION: TrainerConfig,
        }
        given = overrides or {}
        check_keys({**table, **given}, kinds, "the configuration")
        sections = {name: with_model(table_at(table, name), base) for name in kinds}
        named = {**sections["data"], **given.get("data", {})}.get("task", "")
        held = _held(named) if isinstance(named, str) and named else {}
        built: dict[str, Any] = {
            name: section(
                kind, name, {**held.get(name, {}), **sections[name]}, base, given.get(name)
            )
            for name, kind in kinds.items()
        }
        return cls(**built)


class Finetuning:
    """One run: what it learns from is read at once, and nothing is sent before `train`.

    Args:
        config: all settings.

    Attributes:
        train_set: examples to learn from.
        evaluation_set: examples to evaluate on; None for none.

    Raises:
        CheckpointError, UnsupportedModel, PartitionError: the model cannot be used.
        DataError: a file of examples cannot be read.
        ConfigError: settings that do not fit.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        if config.run.out.exists() and not config.run.out.is_dir():
            raise ConfigError(f"{config.run.out} is a file; give a folder for the run")
        self._checkpoint = Checkpoint.open(config.run.model)
        config.parts.partition.trunk_span(self._checkpoint.num_blocks)
        self._tokenizer = load_tokenizer(self._checkpoint)
        self.train_set, self.evaluation_set = _example_sets(config, self._tokenizer)
        self._steps = Steps(config.run.out / CHECKPOINTS).steps()

    @property
    def resumes(self) -> bool:
        """Whether the folder holds a run that can go on."""
        return bool(self._steps)

    @property
    def ended(self) -> Summary | None:
        """How the folder's run ended, if it did."""
        return ended_run(self.config.run.out)

    def protect(self, protection: TrainingProtection) -> TrainingPolicy:
        """What a protection means for this run; opens the ledger.

        Raises:
            ConfigError: the mechanisms do not fit the model, or what is trained.
            LedgerError: the ledger cannot be used.
        """
        parts, checkpoint = self.config.parts, self._checkpoint
        dtype = placement_of(checkpoint, parts.dtype, parts.device, "none").dtype
        return protection.applied(
            checkpoint.hidden_size,
            self.config.lora.train,
            up=codec_of(parts.codec, dtype),
            gradient=codec_of(parts.gradient_codec, dtype),
            tokenizer=self._tokenizer,
        )

    def connect(
        self,
        servers: Servers,
        *,
        tls: ClientTLS | Plaintext | None = None,
        patience: Patience | None = None,
        on_notice: Tell | None = None,
        verifier: Verifier | None = None,
        policy: TrainingPolicy | None = None,
    ) -> SplitForTraining:
        """Load bottom and top, and open a training session where the folder's run can go on.

        Raises:
            StaleStep: the server has none of the folder's steps.
            DataError: an example is longer than the server takes.
            FedseaError: no server in time, or one that refuses.
        """
        run, parts, lora = self.config.run, self.config.parts, self.config.lora
        model = SplitForTraining.connect(
            run.model,
            servers,
            name=run.adapter,
            partition=parts.partition,
            tls=tls,
            lora=lora.config if lora.train else None,
            train=lora.train,
            prompt_rows=lora.prompt_rows,
            optimizer=self.config.training.optimizer,
            seed=self.config.training.seed,
            resume_steps=self._steps[-MOST_OFFERED:] or (0,),
            weight=float(len(self.train_set)),
            dtype=parts.dtype,
            device=parts.device,
            codec=parts.codec,
            gradient_codec=parts.gradient_codec,
            patience=patience,
            on_notice=on_notice,
            guard=None if policy is None else policy.guard(),
            verifier=verifier,
        )
        try:
            self._check_lengths(model.longest)
        except DataError:
            model.close()
            raise
        return model

    def _check_lengths(self, most: int | None) -> None:
        """Refuse at once what would end the training at some later step."""
        sets = (self.train_set, *(() if self.evaluation_set is None else (self.evaluation_set,)))
        longest = max(example.rows for found in sets for example in found.examples)
        if most is not None and longest > most:
            raise DataError(
                f"an example has {longest} rows and the server takes {most}; "
                f"give data.max_tokens={most}, and data.too_long=cut to keep longer ones"
            )

    @contextmanager
    def metrics(self) -> Iterator[list[Callback]]:
        """What writes down every step, as the settings ask for it.

        Raises:
            ConfigError: TensorBoard is wanted and not installed.
        """
        out = self.config.run.out
        if not self.config.run.tensorboard:
            yield [CsvMetrics(out)]
            return
        with closing(TensorBoardMetrics(out)) as board:
            yield [CsvMetrics(out), board]

    def trainer(self, model: SplitForTraining, callbacks: Sequence[Callback] = ()) -> Trainer:
        """What trains the connected model.

        Raises:
            ConfigError: the folder holds another run, or settings do not fit the examples.
        """
        evaluation = None if self.evaluation_set is None else self.evaluation_set.examples
        return Trainer(
            model,
            self.config.training,
            self.train_set.examples,
            evaluation,
            callbacks,
            folder=self.config.run.out,
        )


def _held(name: str) -> Table:
    """What a task says about the sections of a fine-tuning."""
    defaults = task(name).defaults
    return {
        "lora": {
            "rank": defaults.rank,
            "alpha": float(defaults.alpha),
            "dropout": LORA_DROPOUT,
            "targets": LORA_TARGETS,
        },
        "data": {"max_tokens": defaults.max_tokens},
        SECTION: {"learning_rate": defaults.learning_rate},
    }


def _example_sets(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ExampleSet, ExampleSet | None]:
    """Examples to learn from and to evaluate on; those of a task are split with sources whole."""
    run, data, seed = config.run, config.data, config.training.seed
    if not data.task:
        training = read_examples(run.data, tokenizer, data.options)
        if run.evaluation is not None:
            return training, read_examples(run.evaluation, tokenizer, data.options)
        return (
            training.split(run.evaluation_share, seed) if run.evaluation_share else (training, None)
        )
    records = data.records(run.data)
    held_out: list[Record] | None = None
    if run.evaluation is not None:
        held_out = data.records(run.evaluation)
    elif run.evaluation_share:
        records, held_out = split(trainable(records), run.evaluation_share, seed)
    return (
        record_examples(records, tokenizer, data.options),
        None if held_out is None else record_examples(held_out, tokenizer, data.options),
    )
