"""One session's releases as laws: one row for one chain of tokens, charged once, whatever happens."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fedsea.client.protection import Cut, Protection
from fedsea.client.protector import Protector
from fedsea.client.releases import ReleaseStore
from fedsea.errors import BudgetExceeded, UnsafeRows
from fedsea.privacy.accounts import Budget
from fedsea.wire.codecs import Codec

HIDDEN = 6
CHUNK = 4
CUT = Cut("0" * 64, HIDDEN, 1, 1)
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)


class NoTokenizer:
    """A tokenizer without a begin-of-text token."""

    bos_token_id = None


def rows_of(chain):
    """What a causal bottom makes of tokens: each row depends on all tokens up to its own."""
    sums = torch.tensor(chain, dtype=torch.float32).cumsum(0)
    return sums[:, None] + torch.arange(HIDDEN, dtype=torch.float32)


class Releases(RuleBasedStateMachine):
    """Feeds, rollbacks, forks and drops beside a model that remembers every release."""

    def __init__(self) -> None:
        super().__init__()
        self.chains: dict[int, list[int]] = {}
        self.roots: dict[int, int] = {}
        self.released: dict[tuple[int, tuple[int, ...]], bytes] = {}
        self.numbers = iter(range(1000))
        self.folder = TemporaryDirectory(prefix="fedsea-test-")
        self.protector: Protector | None = None
        self.store = ReleaseStore()

    @initialize(
        spec=st.sampled_from(
            ["gaussian:clip_norm=3,mu=1", f"ternary:clip=1,mu=3,sparsity=0.7,width={HIDDEN}"]
        ),
        public=st.integers(0, 3),
        in_memory=st.booleans(),
    )
    def begin_session(self, spec: str, public: int, in_memory: bool) -> None:
        privacy = Protection(
            mechanism=spec, ledger=f"{self.folder.name}/x.ledger", public_prefix=public
        )
        self.public = public
        policy = privacy.applied(CUT, Codec.FP32, NoTokenizer())
        if not in_memory:
            self.store = ReleaseStore(max_memory=40)
        self.protector = Protector(policy, self.store)
        self._begin(self.protector)

    @property
    def _protector(self) -> Protector:
        assert self.protector is not None
        return self.protector

    @rule()
    def begin(self) -> None:
        self._begin(self._protector)

    def _begin(self, protector: Protector) -> None:
        number = next(self.numbers)
        protector.begin(number)
        self.chains[number], self.roots[number] = [], number

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), ids=tokens)
    def feed(self, data: st.DataObject, ids: list[int]) -> None:
        number = data.draw(st.sampled_from(sorted(self.chains)))
        chain = self.chains[number]
        before, start = self._protector.charged, len(chain)
        self._protector.reserve_ahead(number, ids, CHUNK)
        fresh = 0
        for first in range(0, len(ids), CHUNK):
            part = ids[first : first + CHUNK]
            rows = rows_of([*chain, *part])[len(chain) :]
            found = self._protector.release(number, part, rows)
            size = self._protector.policy.rows.row_bytes
            assert len(found) == len(part) * size
            for index, token in enumerate(part):
                chain.append(token)
                key = self.roots[number], tuple(chain)
                row = found[index * size : (index + 1) * size]
                if key not in self.released:
                    fresh += len(chain) > self.public
                    self.released[key] = row
                assert self.released[key] == row
        assert self._protector.charged == before + fresh
        assert len(chain) == start + len(ids)

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.chains)))
        length = data.draw(st.integers(0, len(self.chains[number])))
        self._protector.rollback(number, length)
        del self.chains[number][length:]

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.chains)))
        length = data.draw(st.integers(0, len(self.chains[source])))
        target = next(self.numbers)
        self._protector.fork(source, target, length)
        self.chains[target] = self.chains[source][:length]
        self.roots[target] = self.roots[source]

    @precondition(lambda self: len(self.chains) > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.chains)))
        self._protector.drop(number)
        del self.chains[number]

    def teardown(self) -> None:
        if self.protector is not None:
            charged, policy = self.protector.charged, self.protector.policy
            self.protector.close()
            assert policy.statement().releases == charged
            policy.close()
        self.store.close()
        self.folder.cleanup()


Releases.TestCase.settings = settings(max_examples=25, stateful_step_count=20, derandomize=True)
TestReleases = Releases.TestCase


@pytest.fixture
def protect(tmp_path):
    """A protector with a mechanism and other fields of `Protection`."""
    made = []

    def make(spec="gaussian:clip_norm=3,mu=1", **chosen):
        chosen = {"public_prefix": 0, "ledger": tmp_path / "privacy.ledger", **chosen}
        policy = Protection(mechanism=spec, **chosen).applied(CUT, Codec.FP32, NoTokenizer())
        made.append(Protector(policy, ReleaseStore()))
        made[-1].begin(0)
        return made[-1]

    yield make
    for protector in made:
        protector.close()
        protector.policy.close()


def test_a_refusal_leaves_nothing_behind(protect):
    """What the ledger refused is not kept: later it is drawn anew and charged like any other."""
    protector = protect(budget=Budget(mu=2.0))
    protector.release(0, [1, 2, 3], rows_of([1, 2, 3]))
    with pytest.raises(BudgetExceeded):
        protector.release(0, [1, 2], rows_of([1, 2, 3, 1, 2])[3:])
    assert protector.charged == 3
    protector.release(0, [1], rows_of([1, 2, 3, 1])[3:])
    assert protector.charged == 4


def test_one_bad_row_stops_the_whole_chunk(protect):
    """Rows before and after a NaN are not charged either, and can be released when it is gone."""
    protector = protect()
    rows = rows_of([1, 2, 3])
    rows[1, 2] = float("nan")
    with pytest.raises(UnsafeRows):
        protector.release(0, [1, 2, 3], rows)
    assert protector.charged == 0
    protector.release(0, [1, 2, 3], rows_of([1, 2, 3]))
    assert protector.charged == 3


def test_a_frobenius_chunk_is_one_release(protect):
    """Rows that are clipped together cost once; of a chunk that is known in part, the rest does."""
    protector = protect("gaussian:clip_norm=3,mu=1,by=frobenius")
    protector.reserve_ahead(0, [1, 2, 3, 4, 5], CHUNK)
    first = protector.release(0, [1, 2, 3, 4], rows_of([1, 2, 3, 4]))
    protector.release(0, [5], rows_of([1, 2, 3, 4, 5])[4:])
    assert protector.charged == 2
    protector.rollback(0, 1)
    again = protector.release(0, [2, 3, 9], rows_of([1, 2, 3, 9])[1:])
    size = protector.policy.rows.row_bytes
    assert again[: 2 * size] == first[size : 3 * size]
    assert protector.charged == 3


def test_closing_twice_is_safe(protect):
    """What was reserved goes back once."""
    protector = protect()
    protector.release(0, [1], rows_of([1]))
    protector.close()
    protector.close()
    assert protector.policy.statement().releases == 1


def test_a_ledger_that_is_gone_at_the_end_is_said(protect, caplog):
    """What cannot be given back stays charged; the session ends all the same."""
    protector = protect()
    protector.release(0, [1], rows_of([1]))
    protector.policy.ledger.path.unlink()
    protector.close()
    assert "stay charged" in caplog.text
