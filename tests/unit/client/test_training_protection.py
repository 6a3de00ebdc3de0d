"""Privacy in training: both directions are accounted for, charged once, and before anything is sent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsea.client import training_protection
from fedsea.client.releases import ReleaseStore
from fedsea.client.training_protection import (
    EVALUATIONS_KEPT,
    Record,
    TrainingPolicy,
    TrainingProtection,
    warning_about,
)
from fedsea.errors import BudgetExceeded, ConfigError, LedgerError, LocalProtocolError, NotFinite
from fedsea.privacy.accounts import Budget, Statement
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.registry import mechanism_from_spec
from fedsea.wire.codecs import Codec, RowFormat

HIDDEN = 6
EVERYWHERE = ("bottom", "trunk", "top")
BY_EXAMPLE = "gaussian:clip_norm=2,mu=0.5,by=frobenius"
BY_ROW = "gaussian:clip_norm=2,mu=0.25"
batches = st.lists(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Where a ledger may be."""
    return tmp_path / "x.ledger"


def policy_of(
    ledger: Path | str, train: tuple[str, ...] = EVERYWHERE, **given: Any
) -> TrainingPolicy:
    """A policy over a ledger, with a mechanism in both directions unless another is given."""
    chosen = {"rows": BY_EXAMPLE, "gradients": BY_EXAMPLE, "record": "set", **given}
    return TrainingProtection(ledger=ledger, **chosen).applied(HIDDEN, train)


def rows_of(sequences: list[list[int]]) -> Tensor:
    """Rows for some examples."""
    return torch.arange(sum(map(len, sequences)) * HIDDEN).reshape(-1, HIDDEN) / 10.0


def statement_of(ledger: Path) -> Statement:
    """The one account of a ledger, as another process reads it."""
    with Ledger.open(ledger, create=False) as opened:
        (found,) = opened.statements()
    return found


class TestAccounting:
    """What the ledger says is what the plan said."""

    @settings(max_examples=20)
    @given(
        run=batches,
        specs=st.tuples(
            st.sampled_from([None, BY_EXAMPLE, BY_ROW]), st.sampled_from([BY_EXAMPLE, BY_ROW])
        ),
        evaluated=st.booleans(),
    )
    def test_the_ledger_composes_all_releases(
        self, tmp_path_factory: Any, run: list[list[list[int]]], specs: Any, evaluated: bool
    ) -> None:
        """mu adds in squares over steps, examples, rows where they are clipped, and directions."""
        ledger = tmp_path_factory.mktemp("ledger") / "x.ledger"
        policy = policy_of(ledger, rows=specs[0], gradients=specs[1])
        squares = 0.0
        with policy.guard() as guard:
            for step, batch in enumerate(run, 1):
                guard.begin(step)
                guard.forward(0, batch, rows_of(batch))
                guard.gradient(0, rows_of(batch))
                if evaluated:
                    guard.forward(0, batch, rows_of(batch), no_grad=True)
                for spec, times in zip(specs, (1 + evaluated, 1), strict=True):
                    if spec == BY_EXAMPLE:
                        squares += times * len(batch) * 0.5**2
                    if spec == BY_ROW:
                        squares += times * sum(map(len, batch)) * 0.25**2
        assert policy.statement().spending().mu() == pytest.approx(math.sqrt(squares))
        planned = policy.cost((len(each) for batch in run for each in batch), 1, int(evaluated))
        assert planned.mu() == pytest.approx(math.sqrt(squares))
        policy.close()

    @settings(max_examples=20)
    @given(run=batches)
    def test_examples_that_are_records_compose_in_parallel(
        self, tmp_path_factory: Any, run: list[list[list[int]]]
    ) -> None:
        """The account of each example holds at least what the most released example cost."""
        ledger = tmp_path_factory.mktemp("ledger") / "x.ledger"
        policy = policy_of(ledger, ("trunk",), rows=BY_ROW, of="example")
        rows: dict[tuple[int, ...], int] = {}
        gradients: dict[tuple[int, ...], int] = {}
        with policy.guard() as guard:
            for step, batch in enumerate(run, 1):
                guard.begin(step)
                guard.forward(0, batch, rows_of(batch))
                guard.gradient(0, rows_of(batch))
                for each in map(tuple, batch):
                    rows[each] = rows.get(each, 0) + len(each)
                    gradients[each] = gradients.get(each, 0) + 1
            assert guard.charged == (max(rows.values()), max(gradients.values()))
        policy.close()
        assert statement_of(ledger).record == "set (each example)"

    def test_an_epoch_costs_an_example_as_much_as_it_is_planned(self, ledger: Path) -> None:
        """Epochs over different examples cost each of them its own releases."""
        policy = policy_of(ledger, ("trunk",), of=Record.EXAMPLE)
        data = [[1, 2], [3, 4, 5], [6]]
        with policy.guard() as guard:
            for step in range(6):
                guard.begin(step + 1)
                guard.forward(0, [data[step % 3]], rows_of([data[step % 3]]))
                guard.gradient(0, rows_of([data[step % 3]]))
        planned = policy.cost(map(len, data), epochs=2)
        assert policy.statement().spending().mu() == pytest.approx(planned.mu())
        assert planned.mu() == pytest.approx(math.sqrt(2 * 2 * 0.5**2))

    def test_sessions_add_up_where_examples_are_records(self, ledger: Path) -> None:
        """A session that does not know earlier ones pays for its examples anew."""
        policy = policy_of(ledger, ("trunk",), of=Record.EXAMPLE, rows=None)
        for _ in range(2):
            with policy.guard() as guard:
                guard.begin(1)
                guard.forward(0, [[1]], rows_of([[1]]))
        assert policy.statement().releases == 2

    def test_a_direction_without_a_mechanism_costs_nothing(self, ledger: Path) -> None:
        """Rows that go up as they are go up as they are, and only the gradient is charged."""
        policy = policy_of(ledger, rows=None)
        with policy.guard() as guard:
            guard.begin(1)
            sent = guard.forward(0, [[1, 2]], rows_of([[1, 2]]))
            assert sent == RowFormat(Codec.FP32, HIDDEN).encode(rows_of([[1, 2]]))
            assert guard.charged == (0, 1)
        assert len(policy.statement().charges) == 1

    def test_a_gradient_that_never_came_stays_charged(self, ledger: Path) -> None:
        """A forward pays for its gradient: a step that broke off overstates."""
        policy = policy_of(ledger)
        with policy.guard() as guard:
            guard.begin(1)
            guard.forward(0, [[1]], rows_of([[1]]))
        policy.close()
        assert statement_of(ledger).releases == 2

    def test_a_crash_between_charge_and_send_overstates(self, ledger: Path) -> None:
        """What was charged is on disk before the bytes are handed out, and nothing gives it back."""
        policy = policy_of(ledger)
        guard = policy.guard()
        guard.begin(1)
        guard.forward(0, [[1], [2]], rows_of([[1], [2]]))
        assert statement_of(ledger).releases == 4


class TestOnce:
    """A step that is done anew sends the same bytes and is charged once."""

    def test_the_same_bytes_go_up_again(self, ledger: Path) -> None:
        """Rows, gradients and evaluations are repeated byte for byte, whatever is computed now."""
        batch = [[1, 2], [3]]
        with policy_of(ledger).guard() as guard:
            guard.begin(7)
            first = guard.forward(0, batch, rows_of(batch)), guard.gradient(0, rows_of(batch))
            seen = guard.forward(0, batch, rows_of(batch), no_grad=True)
            guard.begin(7)
            other = rows_of(batch) + 1
            again = guard.forward(0, batch, other), guard.gradient(0, other)
            assert again == first
            assert guard.forward(0, batch, other, no_grad=True) == seen
            assert guard.charged == (4, 2)

    def test_the_next_step_draws_anew(self, ledger: Path) -> None:
        """The same rows at another step, or in another forward, get other noise and are charged."""
        batch = [[1, 2]]
        with policy_of(ledger).guard() as guard:
            guard.begin(1)
            sent = {
                guard.forward(0, batch, rows_of(batch)),
                guard.forward(1, batch, rows_of(batch)),
            }
            guard.begin(2)
            sent.add(guard.forward(0, batch, rows_of(batch)))
            assert len(sent) == 3
            assert guard.charged == (3, 3)

    def test_other_examples_are_other_releases(self, ledger: Path) -> None:
        """A step that is done anew with another batch does not send the bytes of the first."""
        with policy_of(ledger).guard() as guard:
            guard.begin(1)
            first = guard.forward(0, [[1]], rows_of([[1]]))
            assert guard.forward(0, [[2]], rows_of([[2]])) != first
            assert guard.charged == (2, 2)

    def test_bytes_of_a_step_may_lie_on_disk(self, ledger: Path) -> None:
        """A step larger than the store's memory is repeated all the same."""
        batch = [[1, 2], [3]]
        with policy_of(ledger).guard(ReleaseStore(max_memory=10)) as guard:
            guard.begin(1)
            first = guard.forward(0, batch, rows_of(batch))
            assert guard.forward(0, batch, rows_of(batch)) == first

    def test_few_evaluations_are_kept(self, ledger: Path) -> None:
        """Long evaluations do not fill the disk: early ones would be released anew."""
        with policy_of(ledger).guard() as guard:
            guard.begin(1)
            for index in range(EVALUATIONS_KEPT + 1):
                last = guard.forward(index, [[1]], rows_of([[1]]), no_grad=True)
            assert guard.forward(EVALUATIONS_KEPT, [[1]], rows_of([[1]]), no_grad=True) == last
            assert guard.charged == (EVALUATIONS_KEPT + 1, 0)


class TestBudget:
    """A budget that does not hold a batch stops it whole."""

    def test_nothing_of_the_batch_is_sent(self, ledger: Path) -> None:
        """The step is named, what was charged before stays, and the rest comes back at the end."""
        budget = Budget(mu=math.sqrt(5 * 0.5**2))
        policy = policy_of(ledger, budget=budget)
        with policy.guard() as guard:
            for step in (1, 2):
                guard.begin(step)
                guard.forward(0, [[1]], rows_of([[1]]))
                guard.gradient(0, rows_of([[1]]))
            guard.begin(3)
            with pytest.raises(BudgetExceeded, match=r"stops at step 3: 1 more release"):
                guard.forward(0, [[1]], rows_of([[1]]))
            assert guard.charged == (2, 2)
            guard.forward(0, [[1]], rows_of([[1]]), no_grad=True)
            with pytest.raises(BudgetExceeded):
                guard.forward(1, [[1]], rows_of([[1]]), no_grad=True)
        assert policy.statement().releases == 5

    def test_what_a_refused_batch_had_reserved_comes_back(self, ledger: Path) -> None:
        """Rows that were reserved for a batch whose gradient did not fit are given back."""
        policy = policy_of(ledger, budget=Budget(mu=0.5))
        with policy.guard() as guard:
            guard.begin(1)
            with pytest.raises(BudgetExceeded):
                guard.forward(0, [[1]], rows_of([[1]]))
        assert policy.statement().releases == 0

    def test_an_example_that_was_refused_is_not_counted_as_released(self, ledger: Path) -> None:
        """After a refusal the most released example is the one that was really released."""
        policy = policy_of(ledger, ("trunk",), of="example", budget=Budget(mu=0.75))
        with policy.guard() as guard:
            guard.begin(1)
            guard.forward(0, [[1]], rows_of([[1]]))
            with pytest.raises(BudgetExceeded):
                guard.forward(1, [[1]], rows_of([[1]]))
            guard.forward(2, [[2]], rows_of([[2]]))
            assert guard.charged == (1, 1)

    def test_a_ledger_that_vanished_stops_training(self, ledger: Path) -> None:
        """Where nothing can be charged, nothing leaves."""
        with policy_of(ledger).guard() as guard:
            guard.begin(1)
            ledger.unlink()
            with pytest.raises(LedgerError):
                guard.forward(0, [[1]], rows_of([[1]]))

    def test_no_budget_holds_noise_without_a_clip_norm(self, ledger: Path) -> None:
        """The noise of the paper bounds nothing, so a budget for it is refused."""
        with pytest.raises(ConfigError, match="no budget holds it"):
            policy_of(ledger, rows="fedsea:scale=0.02", budget=Budget(mu=1.0))


class TestClipping:
    """What one example can change is bounded in both directions."""

    @settings(max_examples=20)
    @given(
        lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        size=st.floats(1e-3, 1e3),
        codec=st.sampled_from([Codec.FP32, Codec.BF16]),
    )
    def test_gradients_are_clipped_by_example(
        self, tmp_path_factory: Any, lengths: list[int], size: float, codec: Codec
    ) -> None:
        """Without noise, each example's gradient has at most the clip norm, and its direction."""
        ledger = tmp_path_factory.mktemp("ledger") / "x.ledger"
        quiet = Gaussian(2.0, 1e9, "frobenius")  # type: ignore[arg-type]  # its name does as well
        protection = TrainingProtection(gradients=quiet, record="set", ledger=ledger)
        policy = protection.applied(HIDDEN, EVERYWHERE, gradient=codec)
        batch = [[0] * length for length in lengths]
        rows = torch.randn(sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(1)) * size
        with policy.guard() as guard:
            guard.begin(1)
            guard.forward(0, batch, rows)
            sent = guard.gradients_format.decode(guard.gradient(0, rows), len(rows))
        for seen, clean in zip(sent.split(lengths), rows.split(lengths), strict=True):
            factor = min(1.0, 2.0 / float(clean.norm()))
            torch.testing.assert_close(seen, clean * factor, rtol=1e-2, atol=1e-2 * factor * size)
        policy.close()

    @given(
        length=st.integers(1, 5),
        seed=st.integers(0, 99),
        sizes=st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)),
    )
    def test_the_sensitivity_holds(self, length: int, seed: int, sizes: Any) -> None:
        """Two gradients of an example, whatever they are, are at most 2 C apart after clipping."""
        quiet = Gaussian(0.04, 1e9, Clipping.FROBENIUS)
        drawn = torch.Generator().manual_seed(seed)
        one, other = (
            quiet.protect(torch.randn(length, HIDDEN, generator=drawn) * size, NoiseSource())
            for size in sizes
        )
        assert float((one - other).norm()) <= quiet.sensitivity * (1 + 1e-6)
        assert quiet.sensitivity == pytest.approx(0.08)

    def test_the_noise_of_the_released_code(self) -> None:
        """As documented: sigma is the scale times the root of pi / 2, an example is one release."""
        mechanism = mechanism_from_spec("gaussian:clip_norm=0.04,mu=3.19,by=frobenius")
        assert isinstance(mechanism, Gaussian)
        assert mechanism.sigma == pytest.approx(0.02 * math.sqrt(math.pi / 2), rel=1e-3)
        assert mechanism.releases(100) == 1

    def test_a_scaled_gradient_is_clipped_as_if_it_were_not(self, ledger: Path) -> None:
        """A gradient that is 1024 times too large leaves 1024 times as large as it should."""
        quiet = Gaussian(2.0, 1e9, "frobenius")  # type: ignore[arg-type]  # its name does as well
        with policy_of(ledger, gradients=quiet).guard() as guard:
            guard.begin(1)
            rows = torch.ones(1, HIDDEN)
            for index in (0, 1):
                guard.forward(index, [[index]], rows)
            plain = guard.gradients_format.decode(guard.gradient(0, rows), 1)
            scaled = guard.gradients_format.decode(guard.gradient(1, rows * 1024, 1024.0), 1)
            torch.testing.assert_close(scaled, plain * 1024, rtol=1e-5, atol=1e-5)

    def test_a_step_done_anew_in_another_scale_sends_the_same_release(self, ledger: Path) -> None:
        """Dynamic loss scaling halves the scale: what is sent is halved, and no noise is drawn."""
        with policy_of(ledger).guard() as guard:
            guard.begin(1)
            rows, form = torch.ones(2, HIDDEN), guard.gradients_format
            guard.forward(0, [[1, 2]], rows)
            large = form.decode(guard.gradient(0, rows * 8, 8.0), 2)
            guard.begin(1)
            guard.forward(0, [[1, 2]], rows)
            small = form.decode(guard.gradient(0, rows * 4, 4.0), 2)
            assert small.tolist() == (large / 2).tolist()
            assert guard.gradient(0, rows, 8.0) == form.encode(large)
            assert guard.charged == (1, 1)


class TestPublicRows:
    """A prefix is public only where nothing that knows the data computes it."""

    def test_rows_of_a_frozen_bottom_are_public(self, ledger: Path) -> None:
        """Prefix rows travel as they are; the others cost what they cost, the gradient all of it."""
        policy = policy_of(ledger, ("trunk", "top"), rows=BY_ROW, public_prefix=1)
        with policy.guard() as guard:
            guard.begin(1)
            batch = [[1, 2, 3], [1]]
            sent = guard.forward(0, batch, rows_of(batch))
            seen = guard.rows_format.decode(sent, 4)
            assert seen[[0, 3]].tolist() == rows_of(batch)[[0, 3]].tolist()
            assert guard.charged == (2, 2)

    def test_a_mechanism_of_counts_sends_public_rows_as_counts(self, ledger: Path) -> None:
        """A session has one format, so public rows are drawn too, and cost nothing."""
        spec = f"stochastic-quantization:bits=4,clip=1,mu=2,width={HIDDEN}"
        policy = policy_of(ledger, ("trunk",), rows=spec, public_prefix=1)
        with policy.guard() as guard:
            guard.begin(1)
            sent = guard.forward(0, [[1, 2]], rows_of([[1, 2]]))
            assert len(sent) == 2 * guard.rows_format.row_bytes
            assert guard.charged[0] == 1

    def test_a_trained_bottom_has_no_public_rows(self, ledger: Path) -> None:
        """A bottom that is trained knows the data: asking for a prefix is refused."""
        with pytest.raises(ConfigError, match="no row is public"):
            policy_of(ledger, public_prefix=3)
        assert policy_of(ledger).public.reaches(0, [1, 2]) == 0


class TestWarning:
    """One line says what leaks."""

    def test_each_direction_is_named(self) -> None:
        """Nothing, rows alone, gradients alone and noise without a clip norm have their lines."""
        private, bare = Gaussian(1.0, 1.0), FedSEAGaussian(0.02)
        assert warning_about(None, None) == training_protection.NOTHING_PROTECTED
        assert warning_about(private, None) == training_protection.GRADIENTS_BARE
        assert warning_about(None, private) == training_protection.ROWS_BARE
        assert warning_about(private, private) is None
        found = warning_about(bare, private)
        assert found is not None
        assert "rows, fedsea, is not differentially private" in found
        for line in (
            training_protection.NOTHING_PROTECTED,
            training_protection.GRADIENTS_BARE,
            found,
        ):
            assert "\n" not in line

    def test_the_policy_says_it(self, ledger: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A policy logs its warning once, knows it, and describes itself in one line."""
        policy = policy_of(ledger, gradients=None)
        assert caplog.messages == [training_protection.GRADIENTS_BARE]
        assert policy.warning == training_protection.GRADIENTS_BARE
        assert policy.describe().startswith("rows: gaussian:")
        assert "gradients: as they are; protects the data as a whole; spent 0" in policy.describe()


class TestRefusals:
    """Choices that protect nothing are refused, and bad rows leave nothing behind."""

    @pytest.mark.parametrize(
        ("given", "train", "message"),
        [
            ({"rows": None, "gradients": None}, EVERYWHERE, "neither rows nor gradients"),
            ({"rows": "plain", "gradients": None}, EVERYWHERE, "neither rows nor gradients"),
            ({"gradients": "ternary:clip=1,mu=2,sparsity=1"}, EVERYWHERE, "travel as floats"),
            ({"gradients": "gaussian:mu=1"}, EVERYWHERE, "needs clip_norm"),
            ({"of": "example"}, EVERYWHERE, "bottom and the top are trained here"),
            ({"of": "example"}, ("top",), "the top are trained here"),
            ({"of": "batch"}, ("trunk",), "use data, example"),
            ({"record": ""}, EVERYWHERE, "name the record"),
            ({"record": "", "of": "example"}, ("trunk",), "name the record"),
            ({"delta": 1.0}, EVERYWHERE, "no probability"),
            ({"public_prefix": "Dear"}, ("trunk",), "needs the tokenizer"),
            ({"rows": f"ternary:clip=1,mu=2,sparsity=1,width={HIDDEN + 1}"}, EVERYWHERE, "width"),
        ],
    )
    def test_choices(self, ledger: Path, given: Any, train: Any, message: str) -> None:
        """Each is named in one line."""
        with pytest.raises(ConfigError, match=message):
            policy_of(ledger, train, **given)

    def test_rows_that_are_not_finite_cost_nothing(self, ledger: Path) -> None:
        """NaN in rows or gradients stops before the charge, or before anything is kept."""
        policy = policy_of(ledger)
        with policy.guard() as guard:
            guard.begin(1)
            with pytest.raises(NotFinite, match="step 1 is NaN"):
                guard.forward(0, [[1]], torch.full((1, HIDDEN), math.nan))
            assert guard.charged == (0, 0)
            guard.forward(0, [[1]], rows_of([[1]]))
            with pytest.raises(NotFinite, match="step 1 is NaN"):
                guard.gradient(0, torch.full((1, HIDDEN), math.inf))

    def test_what_the_codec_cannot_hold_is_not_finite(self, ledger: Path) -> None:
        """Scaled gradients that overflow fp16 are named as the trainer expects them."""
        protection = TrainingProtection(rows=BY_ROW, record="set", ledger=ledger)
        policy = protection.applied(HIDDEN, EVERYWHERE, gradient=Codec.FP16)
        with policy.guard() as guard:
            guard.begin(1)
            guard.forward(0, [[1]], rows_of([[1]]))
            with pytest.raises(NotFinite, match="cannot be sent"):
                guard.gradient(0, torch.full((1, HIDDEN), 1e5))

    def test_a_ledger_that_cannot_be_settled_does_not_lose_the_training(
        self, ledger: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What was reserved for a refused batch stays charged then, and a line says so."""
        policy = policy_of(ledger, budget=Budget(mu=0.5))
        guard = policy.guard()
        with pytest.raises(BudgetExceeded):
            guard.forward(0, [[1]], rows_of([[1]]))
        policy.close()
        guard.close()
        assert "stay charged" in caplog.text

    def test_rows_and_sequences_belong_together(self, ledger: Path) -> None:
        """Wrong numbers of rows, and gradients of no forward, are refused."""
        with policy_of(ledger).guard() as guard:
            guard.begin(1)
            with pytest.raises(LocalProtocolError, match="2 rows cannot be those of 1"):
                guard.forward(0, [[1]], torch.zeros(2, HIDDEN))
            guard.forward(0, [[1]], rows_of([[1]]))
            for index, count in ((0, 2), (1, 1)):
                with pytest.raises(LocalProtocolError, match="belong to no forward"):
                    guard.gradient(index, torch.zeros(count, HIDDEN))
