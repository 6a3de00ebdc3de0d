"""Protected rows end to end: the server computes with what a mechanism released, and nothing else."""

from __future__ import annotations

import math
import sqlite3

import pytest
import torch

from fedsea.client.huggingface import SplitForCausalLM
from fedsea.client.protection import (
    Mode,
    Protection,
    PublicPrefix,
    Spent,
)
from fedsea.client.sessions import Chat, Session
from fedsea.errors import (
    BudgetExceeded,
    CheckpointError,
    ConfigError,
    FedseaError,
    FingerprintMismatch,
    LedgerError,
    Unreachable,
    UnsafeRows,
)
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.projection import Projection
from fedsea.privacy.accounts import Budget
from fedsea.privacy.calibration import Calibration
from fedsea.privacy.denoiser import Denoiser, Purpose, Shape
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.gaussian_loss import GaussianLoss
from fedsea.privacy.mechanism import Unit
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.registry import mechanism_from_spec
from fedsea.transport.recording import Direction
from fedsea.wire.codecs import Codec
from fedsea.wire.messages import Append, Open, Rollback

HIDDEN = 48
WIDTH = 12
PROMPT = "What did the doctor find?"
NOISY = "gaussian:clip_norm=5,mu=2"
EXACT = "gaussian:clip_norm=100000,mu=1000000000"
"""So little noise that tokens are those of the unsplit model."""
SPECS = {
    "gaussian": NOISY,
    "frobenius": "gaussian:clip_norm=5,mu=2,by=frobenius",
    "fedsea": "fedsea:scale=0.05",
    "one bit": "stochastic-quantization:bits=1,clip=0.5,mu=20",
    "four bits": "stochastic-quantization:bits=4,clip=0.5,mu=20",
    "ternary": "ternary:clip=0.5,mu=5,sparsity=0.6",
    "metric": "metric-dp:eta=300,clip_norm=5",
}


@pytest.fixture
def ledger(tmp_path):
    """A path for a ledger."""
    return tmp_path / "privacy.ledger"


@pytest.fixture
def connect(make_split, ledger):
    """Connect with a mechanism, given by its spec, and other fields of `Protection`."""

    def make(spec=NOISY, *, server=None, partition=(1, 1), codec="auto", **chosen):
        chosen.setdefault("ledger", ledger)
        privacy = Protection(mechanism=spec, **chosen)
        return make_split(server, partition=partition, codec=codec, privacy=privacy)

    return make


@pytest.fixture
def pair(tiny_model):
    """A projection of the tiny model to 12 numbers, for bottom=1."""
    return projection_for(tiny_model)


def projection_for(folder, bottom=1, width=WIDTH):
    """A pair with orthonormal rows."""
    basis = torch.linalg.qr(torch.randn(HIDDEN, width, generator=torch.Generator().manual_seed(2)))[
        0
    ]
    return Projection.of(basis.T, basis, bottom, Checkpoint.open(folder).fingerprint())


def sent_rows(wire):
    """The released row of every (sequence, position), as it was last sent, in bytes."""
    found = {}
    for append in wire.of(Append):
        size = len(append.rows) // append.count
        offset = 0
        for segment in append.segments:
            for position in range(segment.start, segment.end):
                found[segment.sequence, position] = bytes(append.rows[offset : offset + size])
                offset += size
    return found


def releases(completion):
    """Releases that were charged for an answer."""
    assert completion.spent is not None
    return completion.spent.releases


def charged(split):
    """Releases on the account."""
    return split.llm.privacy.statement().releases


def record_protected(monkeypatch, split):
    """A list that gets everything that the mechanism releases from now on."""
    kind = type(split.llm.privacy.mechanism)
    released, protect = [], kind.protect

    def recorded(self, rows, noise):
        result = protect(self, rows, noise)
        released.append(result)
        return result

    monkeypatch.setattr(kind, "protect", recorded)
    return released


def record_entering(split):
    """A list that gets all rows that enter the first block of the server from now on."""
    seen = []
    runner = split.service.trunk.runner
    run = runner.run

    def recorded(rows, *rest):
        seen.append(rows.clone())
        return run(rows, *rest)

    runner.run = recorded
    return seen


@pytest.mark.parametrize("projected", [False, True], ids=["whole", "projected"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_server_computes_with_what_was_released(
    connect, monkeypatch, pair, tmp_path, wire, spec, projected
):
    """Every mechanism, alone and behind a projection: rows at the server are its values, exactly."""
    pair.for_server().save(tmp_path / "decoder.safetensors")
    served = {"model": {"projections": [str(tmp_path / "decoder.safetensors")]}}
    split = connect(spec, server=served, projection=pair.for_client() if projected else None)
    released, seen = record_protected(monkeypatch, split), record_entering(split)
    completion = split.llm.generate(PROMPT, max_new_tokens=9, ignore_eos=True)
    mechanism = split.llm.privacy.mechanism
    values = mechanism.values(torch.cat(released))
    if projected:
        values = torch.cat([pair.decode(mechanism.values(part)) for part in released])
    assert torch.equal(torch.cat(seen), values)
    greeting = wire.of(Open)[0]
    assert (greeting.up_codec is Codec.COUNTS) == (mechanism.levels > 0)
    assert greeting.projection == (pair.fingerprint() if projected else "")
    size = greeting.up_format(HIDDEN).row_bytes
    assert {len(append.rows) // append.count for append in wire.of(Append)} == {size}
    rows = 25 + 8
    by_chunk = spec.endswith("frobenius")
    assert charged(split) == releases(completion) == (1 + 8 if by_chunk else rows)
    assert completion.traffic.rows_up == rows


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8"])
def test_floats_travel_in_the_chosen_codec(connect, wire, codec):
    """Writing a release in fewer bits is post-processing; what is charged stays."""
    split = connect(codec=codec)
    split.llm.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
    assert wire.of(Open)[0].up_codec is Codec(codec)
    assert charged(split) == 28


@pytest.mark.parametrize("partition", [(0, 1), (1, 0), (2, 2)])
def test_little_noise_changes_no_token(connect, greedy, partition):
    """With next to no noise an answer is that of the unsplit model, however it is cut."""
    split = connect(EXACT, partition=partition)
    ids = split.llm.encode(PROMPT)
    assert list(split.llm.generate(PROMPT, max_new_tokens=20).token_ids) == greedy(ids, 20)


def test_samples_share_the_prompt(connect, wire):
    """n samples of one prompt release it once."""
    split = connect()
    completion = split.llm.generate(PROMPT, n=3, max_new_tokens=5, temperature=1.0, ignore_eos=True)
    rows = sent_rows(wire)
    assert len({data for (_, position), data in rows.items() if position < 25}) == 25
    # Samples that drew the same tokens so far have released the same rows.
    distinct = len(set(rows.values()))
    assert releases(completion) == charged(split) == distinct


def test_prompts_that_are_answered_together_share_nothing(connect, wire):
    """Equal prompts are not sent as equal bytes: that they are equal is nobody's business."""
    split = connect()
    split.llm.submit([PROMPT, PROMPT], max_new_tokens=3, ignore_eos=True).result()
    rows = sent_rows(wire)
    assert len(set(rows.values())) == len(rows) == 2 * (25 + 2) == charged(split)


def test_going_back_and_feeding_the_same_costs_nothing(connect, wire):
    """After a rollback the same tokens are the same bytes; other tokens are new, charged releases."""
    split = connect()
    with Session.open(split.llm) as session:
        session.generate(PROMPT, max_new_tokens=6, ignore_eos=True)
        before, spent = sent_rows(wire), session._split.charged
        tokens = session.token_ids
        session.rollback(10)
        session.generate(tokens[10:30], max_new_tokens=1, ignore_eos=True)
        assert sent_rows(wire) == before
        assert session._split.charged == spent == 30
        session.rollback(10)
        session.generate([tokens[10], tokens[11] + 1, *tokens[12:30]], max_new_tokens=1)
        after = sent_rows(wire)
        assert [after[0, n] == before[0, n] for n in range(30)] == [n < 11 for n in range(30)]
        assert session._split.charged == spent + 19


def test_asking_again_repeats_the_last_row(connect, wire):
    """A row that is fed once more for its logits is the same release."""
    split = connect()
    with Session.open(split.llm) as session:
        session.generate(PROMPT, max_new_tokens=6, ignore_eos=True)
        session.rollback(20)
        before = sent_rows(wire)[0, 19]
        completion = session.generate(max_new_tokens=1)
        assert wire.of(Rollback)[-1].length == 19
        assert sent_rows(wire)[0, 19] == before
        assert releases(completion) == 0
        assert completion.spent is not None
        assert completion.spent.describe() == "0 releases charged, unit prompt: nothing was charged"


def test_forks_share_what_they_have_in_common(connect, wire):
    """A branch that feeds what the other one fed releases the same bytes, and differs when it does."""
    split = connect()
    with Session.open(split.llm, 200, forks=1) as session:
        session.generate(PROMPT, max_new_tokens=2, ignore_eos=True)
        with session.fork() as branch:
            session.generate("abcde", max_new_tokens=1)
            spent = session._split.charged
            branch.generate("abcxy", max_new_tokens=1)
            rows = sent_rows(wire)
            common = 26 + 1 + 3
            assert rows[1, common - 1] == rows[0, common - 1]
            assert rows[1, common] != rows[0, common]
            assert session._split.charged == spent + 2


def test_a_chat_charges_only_what_is_new(connect):
    """Each turn of a chat releases its new tokens, the earlier turns stay released."""
    split = connect()
    with Chat(split.llm) as chat:
        first = chat.send("Hi", max_new_tokens=4, ignore_eos=True).result()
        second = chat.send("Yo", max_new_tokens=4, ignore_eos=True).result()
        assert releases(first) == first.traffic.rows_up == 7 + 3
        assert releases(second) <= second.prompt_tokens + 4
        assert charged(split) >= releases(first) + releases(second)


@pytest.mark.parametrize("cut", [3, 8, 14])
def test_a_broken_connection_charges_nothing(connect, wire, cut):
    """What was released goes out again byte for byte; the account is that of an undisturbed run."""
    split = connect()
    wire.cut_at = Direction.DOWN, cut
    completion = split.llm.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    assert wire.connections == 2
    by_connection = [
        {
            key: data
            for number, _, append in wire.events
            if isinstance(append, Append) and number == connection
            for key, data in rows_of(append)
        }
        for connection in (1, 2)
    ]
    again = by_connection[0].keys() & by_connection[1].keys()
    assert len(again) >= 25
    assert all(by_connection[0][key] == by_connection[1][key] for key in again)
    assert releases(completion) == charged(split) == 25 + 19


def rows_of(append):
    """(sequence, position) and bytes of every row of an Append."""
    size, offset = len(append.rows) // append.count, 0
    for segment in append.segments:
        for position in range(segment.start, segment.end):
            yield (segment.sequence, position), bytes(append.rows[offset : offset + size])
            offset += size


def test_a_session_that_ends_between_charge_and_send(connect, wire, monkeypatch):
    """Rows that were charged and could not be sent go out later, unchanged and at their place."""
    split = connect()
    with Session.open(split.llm) as session:
        session.generate(PROMPT, max_new_tokens=1)
        trunk, parts = session._split._trunk, type(split.llm.split.parts)
        run_bottom = parts.run_bottom

        async def last_rows(self, job):
            rows = await run_bottom(self, job)
            await trunk._drop_link(trunk._link)  # type: ignore[arg-type]  # it is open
            trunk._link = None
            trunk._fail(Unreachable("nobody is there"))
            return rows

        monkeypatch.setattr(parts, "run_bottom", last_rows)
        with pytest.raises(Unreachable):
            session.generate("abc", max_new_tokens=3)
        monkeypatch.undo()
        protector = session._split._protector
        assert protector is not None
        assert protector.length(0) == session._split.length(0) == 25
        session.generate(max_new_tokens=3, ignore_eos=True)
        assert len(sent_rows(wire)) == session._split.charged == 25 + 4 + 2


def test_recomputing_without_a_cache_would_cost_more(connect):
    """The baseline without a KV cache sends the text anew for every token: each time new releases."""
    split = connect()
    ids = list(split.llm.encode(PROMPT))
    cached = split.llm.generate(ids, max_new_tokens=6, ignore_eos=True)
    before = charged(split)
    for _ in range(6):
        ids.append(split.llm.generate(ids, max_new_tokens=1, ignore_eos=True).token_ids[0])
    without = charged(split) - before
    assert releases(cached) == 25 + 5
    assert without == sum(25 + step for step in range(6))
    loss = split.llm.privacy.mechanism.loss()
    assert loss.composed(without).mu() > 2 * loss.composed(30).mu()


def test_a_prompt_over_the_budget_is_not_sent_at_all(connect, wire):
    """All of a prompt fits, or none of it goes out; what does fit is answered afterwards."""
    split = connect(budget=Budget(mu=2 * math.sqrt(300)))
    long = "x" * 301
    with pytest.raises(BudgetExceeded, match="300 more fit"):
        split.llm.generate(long, max_new_tokens=1)
    assert not wire.of(Append)
    assert charged(split) == 0
    with Session.open(split.llm) as session:
        with pytest.raises(BudgetExceeded):
            session.generate(long, max_new_tokens=1)
        assert not wire.of(Append)
        session.rollback(0)
        assert session.generate(long[:20], max_new_tokens=3).token_ids
    assert "spent 2" in split.llm.describe_mode()


def test_a_budget_that_ends_in_an_answer(connect, wire):
    """The answer ends with what is left; a raised budget lets the session go on where it was."""
    budget = Budget(mu=2 * math.sqrt(30))
    split = connect(budget=budget)
    with Session.open(split.llm) as session:
        stream = session.stream(PROMPT, max_new_tokens=20, ignore_eos=True)
        with pytest.raises(BudgetExceeded, match="0 more fit"):
            list(stream)
        assert len(sent_rows(wire)) == 30 == charged(split)
        before = sent_rows(wire)
        assert session.position == 31
        split.llm.privacy.ledger.set_budget("default", Unit.PROMPT, None, None)
        session.generate(max_new_tokens=4, ignore_eos=True)
        after = sent_rows(wire)
        assert {key: after[key] for key in before} == before
        assert len(after) == 34


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_not_sent(connect, wire, bad):
    """A NaN of the bottom is refused before it is charged, and the session can be used on."""
    split = connect()
    runner = split.llm.split.parts.bottom
    run = runner.run

    def broken(entering, batch):
        rows = run(entering, batch)
        return rows.masked_fill(torch.arange(rows.shape[1]) == 7, bad) if damaged else rows

    runner.run = broken
    damaged = True
    with Session.open(split.llm) as session:
        with pytest.raises(UnsafeRows, match="nothing was sent"):
            session.generate(PROMPT, max_new_tokens=2)
        assert not wire.of(Append)
        assert session._split.charged == 0
        damaged = False
        session.rollback(0)
        session.generate(PROMPT, max_new_tokens=2, ignore_eos=True)
        damaged = True
        with pytest.raises(UnsafeRows):
            session.generate("more", max_new_tokens=2)
        damaged = False
        session.generate(max_new_tokens=2, ignore_eos=True)
        assert session._split.charged == len(sent_rows(wire)) == 25 + 2 + 4 + 1
    assert charged(split) == 25 + 2 + 4 + 1


def test_what_was_reserved_and_not_used_comes_back(connect):
    """Decoding reserves in blocks; the end of a session settles them, and so does the client's."""
    split = connect()
    split.llm.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
    assert charged(split) == 27
    session = Session.open(split.llm)
    session.generate("abc", max_new_tokens=3, ignore_eos=True)
    assert charged(split) > 27 + 5
    ledger = split.llm.privacy.ledger.path
    session.close()
    assert charged(split) == 27 + 5
    with sqlite3.connect(ledger) as db:
        assert db.execute("SELECT count(*) FROM reservations").fetchone() == (0,)


def test_a_public_beginning_is_free_and_clean(connect, wire, monkeypatch):
    """Rows of a declared public text travel as they are and cost nothing."""
    split = connect(public_prefix="What did the")
    bottom = []
    runner = split.llm.split.parts.bottom
    run = runner.run

    def recorded(ids, batch):
        bottom.append(run(ids, batch))
        return bottom[-1]

    runner.run = recorded
    completion = split.llm.generate(PROMPT, max_new_tokens=1)
    public = len("What did the")
    assert releases(completion) == charged(split) == 25 - public
    chosen = wire.of(Open)[0].up_format(HIDDEN)
    sent = chosen.decode(wire.of(Append)[0].rows, 25)
    assert torch.equal(sent[:public], bottom[0][:public].float())
    assert not torch.equal(sent[public:], bottom[0][public:].float())


@pytest.mark.parametrize("prompt", ["Who", "What did th", "What did our", "x", "<s>What"])
def test_a_private_text_that_begins_like_the_public_one_is_private(connect, prompt):
    """Words that a private prompt shares with the public text are protected and charged."""
    split = connect(public_prefix="What did the")
    ids = split.llm.encode(prompt)
    assert releases(split.llm.generate(prompt, max_new_tokens=1)) == len(ids)


def test_a_public_text_over_several_chunks(connect, wire):
    """It is recognised by all of the prompt that is fed, and fed in parts only by what came."""
    public = "y" * 300
    split = connect(public_prefix=public)
    assert releases(split.llm.generate(public + "abc", max_new_tokens=1)) == 3
    assert releases(split.llm.generate(public[:299] + "abc", max_new_tokens=1)) == 302
    with Session.open(split.llm, 400) as session:
        assert releases(session.generate(public[:280], max_new_tokens=1)) == 280


def test_a_number_of_public_tokens(connect):
    """A declared number of tokens is free whatever they are, in a prompt of several chunks too."""
    split = connect(public_prefix=300)
    assert releases(split.llm.generate("y" * 310, max_new_tokens=1)) == 10
    assert releases(split.llm.generate("y" * 299, max_new_tokens=3, ignore_eos=True)) == 1


def test_public_rows_of_counts_are_counts(connect, wire):
    """A mechanism of counts sends public rows in its own format, without a charge."""
    split = connect(SPECS["four bits"], public_prefix=5)
    completion = split.llm.generate(PROMPT, max_new_tokens=1)
    assert releases(completion) == 20
    assert len(sent_rows(wire)) == 25


def test_begin_of_text_is_public_by_default(connect):
    """The default is the model's begin-of-text token, when a prompt begins with it."""
    split = connect()
    assert releases(split.llm.generate([1, 7, 8, 9], max_new_tokens=1)) == 3
    assert releases(split.llm.generate([7, 1, 8, 9], max_new_tokens=1)) == 4


def test_public_prefixes(tiny_model, connect):
    """How far tokens are public, from any position."""
    tokenizer = connect().llm.tokenizer
    assert PublicPrefix.of("bos", tokenizer).ids == (1,)
    text = PublicPrefix(ids=(1, 5, 6), alone=1)
    begun = ([1, 5], [1, 7, 6], [5, 6], [1, 5, 6, 8], [1])
    assert [text.reaches(0, tokens) for tokens in begun] == [1, 1, 0, 3, 1]
    assert [text.reaches(1, tokens) for tokens in ([5, 6, 1], [5], [1])] == [2, 0, 0]
    assert text.reaches(3, [1]) == 0
    assert PublicPrefix.of("<s>ab", tokenizer).alone == 1
    assert PublicPrefix.of("ab", tokenizer).alone == 0
    number = PublicPrefix(length=4)
    assert (number.reaches(0, [1]), number.reaches(3, [1, 1]), number.reaches(9, [1])) == (1, 1, 0)
    with pytest.raises(ConfigError, match="0 or more"):
        PublicPrefix.of(-1, tokenizer)


def test_the_unit_token_pays_once_for_all_positions(connect):
    """With bottom=0 a token changes one row: positions compose in parallel, sessions do not."""
    split = connect(partition=(0, 1), unit="token")
    assert releases(split.llm.generate(PROMPT, max_new_tokens=5)) == 1
    assert charged(split) == 1
    with Session.open(split.llm) as session:
        session.generate(PROMPT, max_new_tokens=1)
        session.rollback(3)
        session.generate("!!!", max_new_tokens=1)
        assert session._split.charged == 2
    assert charged(split) == 3


def test_the_unit_token_refuses_choices_by_the_prompt(connect, wire):
    """A token that also decides which tokens are fed later would change more rows than its own."""
    split = connect(partition=(0, 1), unit="token")
    ids = torch.tensor([split.llm.encode(PROMPT)])
    model = SplitForCausalLM.from_llm(split.llm)
    with Session.open(split.llm) as session:
        for ask in (
            lambda: split.llm.generate(PROMPT, repetition_penalty=1.2),
            lambda: split.llm.stream(PROMPT, repetition_penalty=1.2),
            lambda: session.stream(PROMPT, repetition_penalty=1.2),
            lambda: model.generate(ids, max_new_tokens=3, repetition_penalty=1.2),
            lambda: model.generate(ids, max_new_tokens=3, no_repeat_ngram_size=3),
            lambda: model.generate(ids, max_new_tokens=3, prompt_lookup_num_tokens=2),
        ):
            with pytest.raises(ConfigError, match="unit token does not count"):
                ask()
    assert not wire.of(Append)
    assert charged(split) == 0


def test_other_units_count_choices_by_the_prompt(connect):
    """All rows of a prompt compose there, whichever token they depend on."""
    split = connect()
    completion = split.llm.generate(
        PROMPT, repetition_penalty=1.2, max_new_tokens=3, ignore_eos=True
    )
    assert releases(completion) == 27


def test_records_have_accounts_of_their_own(connect):
    """The unit record counts under the record's name."""
    split = connect(unit="record", record="visit 17", budget=Budget(mu=100))
    split.llm.generate(PROMPT, max_new_tokens=1)
    statement = split.llm.privacy.statement()
    assert (statement.unit, statement.record, statement.releases) == (Unit.RECORD, "visit 17", 25)
    assert "unit record; spent 25 releases, epsilon" in split.llm.describe_mode()
    assert "budget mu 100" in repr(split.llm)


@pytest.mark.parametrize(
    ("chosen", "error", "words"),
    [
        (
            {"mechanism": "whitening"},
            ConfigError,
            "no mechanism 'whitening'; known: plain, gaussian",
        ),
        ({"mechanism": "gaussian:mu=1"}, ConfigError, "clip_norm"),
        ({"mechanism": "gaussian:clip_norm=-1,mu=1"}, ConfigError, "clip_norm=-1"),
        ({"mechanism": "plain"}, ConfigError, "plain is no mechanism"),
        ({"unit": "word"}, ConfigError, "use token, prompt, record"),
        ({"unit": "token"}, ConfigError, "bottom=1 a token changes all later rows"),
        ({"unit": "record"}, ConfigError, "name the record"),
        ({"record": "r"}, ConfigError, "use unit record"),
        ({"tenant": ""}, ConfigError, "give one"),
        ({"delta": 0.0}, ConfigError, "delta 0.0"),
        ({"public_prefix": -3}, ConfigError, "0 or more"),
        ({"mechanism": "fedsea:scale=0.02", "budget": Budget(mu=1)}, ConfigError, "not different"),
        ({"mechanism": "stochastic-quantization:bits=4,clip=1,mu=1,width=7"}, ConfigError, "width"),
        ({"projection": "missing.safetensors"}, CheckpointError, "missing"),
        ({"ledger": "."}, LedgerError, "is no file"),
    ],
)
def test_choices_that_cannot_be(connect, wire, ledger, chosen, error, words):
    """Every wrong choice is refused when the client connects, before anything is sent."""
    with pytest.raises(error, match=words):
        connect(**{("spec" if key == "mechanism" else key): value for key, value in chosen.items()})
    assert not wire.events


@pytest.mark.parametrize("change", ["hidden", "cut", "model", "half", "unserved", "width"])
def test_projections_that_do_not_fit(connect, tiny_model, wire, change):
    """A projection for something else is refused when the client connects."""
    whole = projection_for(tiny_model, bottom=2 if change == "cut" else 1)
    if change == "hidden":
        whole = Projection.of(torch.eye(4, 32), torch.eye(32, 4), 1, whole.model)
    if change == "model":
        whole = Projection.of(torch.eye(4, HIDDEN), torch.eye(HIDDEN, 4), 1, "a" * 64)
    chosen = whole.for_server() if change == "half" else whole
    spec = "stochastic-quantization:bits=4,clip=1,mu=1,width=48" if change == "width" else NOISY
    words = {
        "hidden": "rows of 32 numbers",
        "cut": "trained for bottom=2",
        "model": "trained for the checkpoint aaaaaaaaaaaa",
        "half": "no encoder",
        "unserved": "memory does not serve the projection",
        "width": "width",
    }
    with pytest.raises(
        ConfigError if change != "model" else FingerprintMismatch, match=words[change]
    ):
        connect(spec, projection=chosen)
    assert not wire.of(Append)


def test_a_corrupt_ledger_stops_everything(connect, ledger, wire):
    """A damaged file is refused when the client connects; one that is damaged later, before sending."""
    ledger.write_bytes(b"not a database, " * 64)
    ledger.chmod(0o600)
    with pytest.raises(LedgerError):
        connect()
    assert not wire.events
    ledger.unlink()
    split = connect()
    split.llm.generate(PROMPT, max_new_tokens=1)
    sent = len(wire.of(Append))
    ledger.unlink()
    with pytest.raises(LedgerError, match="removed or replaced"):
        split.llm.generate(PROMPT, max_new_tokens=1)
    assert len(wire.of(Append)) == sent
    assert "removed or replaced" in repr(split.llm)


def test_a_centre_comes_from_public_statistics(connect, tiny_model):
    """A spec is centred on the mean of a calibration of this cut, and on no other."""
    fingerprint = Checkpoint.open(tiny_model).fingerprint()
    public = [torch.randn(20, HIDDEN) + 3]
    fits = Calibration.of(public, 1, fingerprint)
    split = connect(calibration=fits)
    assert "center=" in split.llm.privacy.mechanism.spec()
    split.llm.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(ConfigError, match="bottom=2"):
        connect(calibration=Calibration.of(public, 2, fingerprint))
    with pytest.raises(ConfigError, match="centre of a mechanism that is given by its spec"):
        connect(Gaussian(10.0, 1.0), calibration=fits)


def test_modes_in_words(connect, make_split):
    """Plain is never called private; noisy says what one release guarantees and what is left."""
    plain = make_split()
    assert plain.llm.mode is Mode.PLAIN
    assert "mode plain: no confidentiality against the server" in repr(plain.llm)
    assert "private" not in repr(plain.llm)
    completion = plain.llm.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
    assert completion.spent is None
    assert completion.traffic.rows_up == 27
    noisy = connect("gaussian:clip_norm=5,mu=1", budget=Budget(epsilon=50.0))
    assert noisy.llm.mode is Mode.NOISY
    for words in (
        "mode noisy: gaussian:clip_norm=5,mu=1,by=row; one release: mu 1, epsilon 4.377",
        "recovery of a token at most 3.39% where a guess is right 1% of the time",
        "unit prompt; spent 0 releases, epsilon 0 at delta 1e-05; budget epsilon 50",
    ):
        assert words in noisy.llm.describe_mode()
    unclipped = connect("fedsea:scale=0.02", tenant="other")
    assert "not differentially private" in unclipped.llm.describe_mode()
    unclipped.llm.generate(PROMPT, max_new_tokens=1)
    assert "without a guarantee" in unclipped.llm.describe_mode()


def test_what_releases_amount_to():
    """The figures of an answer are those of its composed releases."""
    spent = Spent(25, GaussianLoss(0.2, 0.1), Unit.PROMPT, 1e-5)
    composed = spent.composed()
    assert composed is not None
    assert composed.mu() == pytest.approx(1.0)
    assert spent.describe().startswith("25 releases charged, unit prompt: mu 1, epsilon 4.377 at")


def identity_denoiser(split_folder, spec, top=1):
    """A denoiser that gives back what it gets, for the tiny model."""
    mechanism = mechanism_from_spec(spec, width=HIDDEN)
    assert mechanism is not None
    purpose = Purpose(Checkpoint.open(split_folder).fingerprint(), 1, top, mechanism.spec())
    return Denoiser(Shape(HIDDEN, HIDDEN, inner=16, layers=2, heads=2, window=8), purpose).eval()


def test_a_denoiser_sees_clean_rows_and_noise(connect, tiny_model, monkeypatch):
    """It gets, once and in order, the rows of every position and what the release added to them."""
    split = connect(denoiser=identity_denoiser(tiny_model, NOISY))
    released = record_protected(monkeypatch, split)
    heard = []
    restorer = type(split.llm.privacy.denoiser.sequence())
    restore = restorer.restore

    def recorded(self, rows, clean, noise):
        heard.append((self.length, clean, noise))
        return restore(self, rows, clean, noise)

    monkeypatch.setattr(restorer, "restore", recorded)
    split.llm.generate(PROMPT, max_new_tokens=6, ignore_eos=True)
    assert [start for start, _, _ in heard] == [0, *range(25, 30)]
    seen = torch.cat([clean + noise for _, clean, noise in heard])
    torch.testing.assert_close(seen, torch.cat(released))


def test_a_denoiser_follows_sessions(connect, tiny_model, wire, greedy):
    """Through rollbacks, forks, breaks and refusals its answers stay those of the sequence."""
    split = connect(EXACT, denoiser=identity_denoiser(tiny_model, EXACT))
    wire.cut_at = Direction.DOWN, 6
    with Session.open(split.llm, 200, forks=1) as session:
        session.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
        session.rollback(28)
        session.generate(max_new_tokens=4, ignore_eos=True)
        with session.fork() as branch:
            branch.generate(" So?", max_new_tokens=4, ignore_eos=True)
            assert list(branch.token_ids[-4:]) == greedy(branch.token_ids[:-4], 4)
        answer = session.generate("?", max_new_tokens=4, ignore_eos=True)
        assert list(answer.token_ids) == greedy(session.token_ids[:-4], 4)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"spec": "gaussian:clip_norm=5,mu=3"}, "mechanism"),
        ({"partition": (1, 2)}, "top"),
        ({"partition": (0, 1), "unit": "token"}, "unit token does not count"),
    ],
)
def test_denoisers_that_do_not_fit(connect, tiny_model, wire, chosen, words):
    """A denoiser is for one mechanism and one cut, and not for the unit token."""
    with pytest.raises(ConfigError, match=words):
        connect(denoiser=identity_denoiser(tiny_model, NOISY), **chosen)
    assert not wire.events


def test_noise_is_new_in_every_session(connect, wire):
    """The same prompt in another session is released with other noise, and charged again."""
    split = connect()
    for _ in range(2):
        split.llm.generate(PROMPT, max_new_tokens=1)
    first, second = (dict(rows_of(append)) for append in wire.of(Append))
    assert not {*first.values()} & {*second.values()}
    assert charged(split) == 50


def test_a_test_seed_repeats_everything(connect, wire):
    """Under an explicit test seed two clients send the same bytes."""
    sent = []
    for _ in range(2):
        connect(noise=NoiseSource(b"seed")).llm.generate(PROMPT, max_new_tokens=1)
        sent.append(wire.of(Append)[-1].rows)
    assert sent[0] == sent[1]


def test_errors_tell_nothing(connect):
    """No error of a refusal holds text, ids or rows."""
    split = connect(budget=Budget(mu=1))
    with pytest.raises(FedseaError) as refusal:
        split.llm.generate("Maria Okafor", max_new_tokens=1)
    assert "Maria" not in str(refusal.value)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["beams", "samples", "lookup"],
)
def test_transformers_code_releases_each_row_once(connect, wire, greedy, options):
    """Beams, samples and drafts over a split model: every chain of tokens is charged once."""
    split = connect(EXACT)
    ids = [5, 17, 33, 8, 60, 21, 17, 33, 8, 60, 4]
    whole = torch.tensor([ids])
    with SplitForCausalLM.from_llm(split.llm) as model:
        found = model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            max_new_tokens=12,
            **{"do_sample": False, **options},
        )
    rows = [data for append in wire.of(Append) for _, data in rows_of(append)]
    assert charged(split) == len(set(rows))
    assert len(found[0]) > len(ids)
    if "prompt_lookup_num_tokens" in options:
        assert found[0, len(ids) :].tolist() == greedy(ids, 12)
