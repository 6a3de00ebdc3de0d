from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import BudgetExceeded, ConfigError
from fedsea.privacy.accounts import Budget
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.mechanism import Unit
from fedsea.privacy.metering import BLOCK, SessionMeter

ONE = Gaussian(clip_norm=1.0, mu=1.0)
CHUNK = Gaussian(clip_norm=1.0, mu=1.0, by=Clipping.FROBENIUS)


@pytest.fixture
def ledger(tmp_path):
    """An empty ledger."""
    with Ledger.open(tmp_path / "privacy.ledger") as opened:
        yield opened


def charged(account):
    """Releases of the account now."""
    return account.statement().releases


def test_positions_of_a_session_are_parallel(ledger):
    """Unit token: a prompt and its whole answer cost one release."""
    account = ledger.account("acme", Unit.TOKEN, ONE, budget=Budget(mu=1.0))
    with SessionMeter(account) as meter:
        meter.reserve_ahead(100)
        meter.reserve_positions(0, 100)
        for position in range(100, 300):
            meter.reserve_positions(position, 1)
    assert charged(account) == 1


def test_another_token_at_a_position_is_another_release(ledger):
    """Unit token: the most released position counts, not the sum of all."""
    account = ledger.account("acme", Unit.TOKEN, ONE)
    with SessionMeter(account) as meter:
        meter.reserve_positions(0, 10)
        meter.reserve_positions(5, 5)
        meter.reserve_positions(0, 3)
        assert charged(account) == 2
        meter.reserve_positions(5, 1)
        assert charged(account) == 3


def test_sessions_compose_sequentially(ledger):
    """Unit token: each session pays, because the same text may come again."""
    account = ledger.account("acme", Unit.TOKEN, ONE, budget=Budget(mu=2.0))
    for _ in range(4):
        with SessionMeter(account) as meter:
            meter.reserve_positions(0, 10)
    with SessionMeter(account) as meter, pytest.raises(BudgetExceeded):
        meter.reserve_positions(0, 1)
    assert charged(account) == 4


def test_sequences_apart_add_up_and_forks_share_what_they_have_in_common(ledger):
    """Unit token: a text that comes again in the same session is released again, and paid again."""
    account = ledger.account("acme", Unit.TOKEN, ONE)
    with SessionMeter(account) as meter:
        meter.reserve_positions(0, 10, sequence=0)
        meter.reserve_positions(0, 10, sequence=1)
        assert charged(account) == 2
        meter.fork(0, 2)
        meter.reserve_positions(10, 1, sequence=0)
        assert charged(account) == 2
        meter.reserve_positions(10, 1, sequence=2)
        assert charged(account) == 3
        meter.drop(0)
        meter.reserve_positions(0, 10, sequence=0)
        assert charged(account) == 4


def test_a_refused_release_is_not_counted(ledger):
    """Unit token: after a refusal another position may still be released."""
    account = ledger.account("acme", Unit.TOKEN, ONE, budget=Budget(mu=1.0))
    with SessionMeter(account) as meter:
        meter.reserve_positions(0, 4)
        for _ in range(3):
            with pytest.raises(BudgetExceeded):
                meter.reserve_positions(3, 1)
        meter.reserve_positions(4, 1)
    assert charged(account) == 1


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=20
    )
)
def test_a_session_costs_the_most_released_position_of_each_text(tmp_path_factory, messages):
    """Unit token: whatever is sent in whatever order, each sequence costs its largest count."""
    with Ledger.open(tmp_path_factory.mktemp("law") / "privacy.ledger") as ledger:
        account = ledger.account("acme", Unit.TOKEN, ONE)
        counts: dict[tuple[int, int], int] = {}
        with SessionMeter(account) as meter:
            for start, count, sequence in messages:
                meter.reserve_positions(start, count, sequence)
                for position in range(start, start + count):
                    key = sequence, position
                    counts[key] = counts.get(key, 0) + 1
                texts = {sequence for sequence, _ in counts}
                deepest = [max(n for (s, _), n in counts.items() if s == text) for text in texts]
                assert charged(account) == sum(deepest)


@pytest.mark.parametrize("unit", [Unit.PROMPT, Unit.RECORD])
def test_all_releases_of_a_session_compose(ledger, unit):
    """Units prompt and record: the prompt exactly, decoding in blocks, the rest comes back."""
    account = ledger.account("acme", unit, ONE, "7" if unit is Unit.RECORD else None)
    with SessionMeter(account) as meter:
        meter.reserve_positions(0, 100)
        assert charged(account) == 100
        meter.reserve_positions(100, 1)
        assert charged(account) == 100 + BLOCK
        for position in range(101, 100 + BLOCK):
            meter.reserve_positions(position, 1)
        assert charged(account) == 100 + BLOCK
        meter.reserve_positions(100 + BLOCK, 1)
        assert charged(account) == 100 + 2 * BLOCK
    assert charged(account) == 100 + BLOCK + 1


def test_a_prompt_is_reserved_whole_or_not_at_all(ledger):
    """A prompt that does not fit is refused before its first chunk is sent."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=10.0))
    with SessionMeter(account) as meter:
        with pytest.raises(BudgetExceeded):
            meter.reserve_ahead(101)
        meter.reserve_ahead(100)
        for start in range(0, 100, 25):
            meter.reserve_positions(start, 25)
        with pytest.raises(BudgetExceeded):
            meter.reserve_positions(100, 1)
    assert charged(account) == 100


def test_prompts_that_are_sent_together_are_each_reserved_whole(ledger):
    """What is set aside for one prompt serves no other and no decoding of others meanwhile."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=10.0))
    with SessionMeter(account) as meter:
        meter.reserve_ahead(60, sequence=0)
        with pytest.raises(BudgetExceeded):
            meter.reserve_ahead(60, sequence=1)
        meter.reserve_ahead(39, sequence=1)
        meter.reserve_positions(0, 1, sequence=2)
        with pytest.raises(BudgetExceeded):
            meter.reserve_positions(1, 1, sequence=2)
        for start in range(0, 60, 20):
            meter.reserve_positions(start, 20, sequence=0)
        meter.drop(1)
        meter.reserve_positions(1, 1, sequence=2)
    assert charged(account) == 62


def test_decoding_uses_a_budget_to_its_end(ledger):
    """The last block is as long as what is left."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=10.0))
    with SessionMeter(account) as meter:
        for position in range(100):
            meter.reserve_positions(position, 1)
        with pytest.raises(BudgetExceeded):
            meter.reserve_positions(100, 1)
    assert charged(account) == 100


def test_a_chunk_under_one_norm_is_one_release(ledger):
    """Clipped by the Frobenius norm, a chunk costs one release and a decoded row another."""
    account = ledger.account("acme", Unit.PROMPT, CHUNK)
    with SessionMeter(account) as meter:
        meter.reserve_positions(0, 256)
        meter.reserve_positions(256, 256)
        meter.reserve_positions(512, 1)
    assert charged(account) == 3


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 0), (0, -3)])
def test_positions_without_sense_are_refused(ledger, start, count):
    """Negative positions and no rows cannot be charged."""
    account = ledger.account("acme", Unit.TOKEN, ONE)
    with SessionMeter(account) as meter, pytest.raises(ConfigError, match="cannot be charged"):
        meter.reserve_positions(start, count)
    with pytest.raises(ConfigError, match="block of 0"):
        SessionMeter(account, block=0)
