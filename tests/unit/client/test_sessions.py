"""Sessions and chats: continuing, going back and branching equal fresh runs, whatever broke."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from fedsea.client.link import Patience
from fedsea.client.sampling import FinishReason
from fedsea.client.sessions import Chat, Session
from fedsea.errors import ConfigError, PromptTooLong, RequestError, Unreachable
from fedsea.transport.recording import Direction
from fedsea.wire.messages import Append, Open, Rollback

PROMPT = "What did the doctor find?"
DOWN = Direction.DOWN


@pytest.fixture
def session(split):
    """A session with room for one branch more."""
    with Session.open(split.llm, 1024, forks=1) as opened:
        yield opened


def whole(greedy, session, prompt_tokens):
    """What a fresh run makes of the first tokens of a session."""
    ids = session.token_ids
    return greedy(ids[:prompt_tokens], len(ids) - prompt_tokens)


def test_an_answer_is_continued(session, greedy):
    """Two answers in a row are one long answer."""
    first = session.generate(PROMPT, max_new_tokens=12)
    second = session.generate(max_new_tokens=12)
    assert list(first.token_ids + second.token_ids) == greedy(session.token_ids[:25], 24)
    assert session.position == 25 + 24


def test_a_second_prompt_joins_the_text(session, greedy):
    """A later prompt stands behind everything before it, the last token included."""
    session.generate(PROMPT, max_new_tokens=9)
    answer = session.generate(" And then?", max_new_tokens=9)
    assert list(answer.token_ids) == greedy(session.token_ids[:-9], 9)


def test_only_what_is_new_is_sent(session):
    """Continuing sends the new prompt and the last token, nothing before."""
    session.generate(PROMPT, max_new_tokens=5)
    before = session.traffic.rows_up
    session.generate("12345", max_new_tokens=1)
    assert before == 25 + 4
    assert session.traffic.rows_up - before == 1 + 5


@pytest.mark.parametrize("position", [0, 10, 25, 30, 36, 37])
def test_going_back_equals_a_fresh_run(session, greedy, position):
    """After a rollback to any position the text goes on as if it had never been longer."""
    session.generate(PROMPT, max_new_tokens=12)
    session.rollback(position)
    assert session.position == position
    answer = session.generate("Yes" if position == 0 else "", max_new_tokens=8)
    assert list(answer.token_ids) == greedy(session.token_ids[:-8], 8)


def test_asking_again_makes_the_last_row_anew(session, greedy, wire):
    """Continuing at a position whose row was sent rolls back one row and nothing else."""
    session.generate(PROMPT, max_new_tokens=12)
    session.rollback(30)
    session.generate(max_new_tokens=4)
    assert [event.length for event in wire.of(Rollback)] == [30, 29]


def test_a_fork_goes_its_own_way(session, greedy):
    """Both branches equal fresh runs, whichever speaks first."""
    session.generate(PROMPT, max_new_tokens=6)
    with session.fork() as branch:
        assert branch.token_ids == session.token_ids
        branch.generate(" No.", max_new_tokens=7)
        session.generate(" Yes.", max_new_tokens=7)
        branch.generate(max_new_tokens=3)
        for one, count in ((branch, 10), (session, 7)):
            start = one.position - count
            assert list(one.token_ids[start:]) == greedy(one.token_ids[:start], count)


def test_branches_answer_at_the_same_time(session, greedy):
    """Two branches that stream at once do not disturb each other."""
    session.generate(PROMPT, max_new_tokens=6)
    with session.fork() as branch:
        streams = [
            one.stream(prompt, max_new_tokens=10)
            for one, prompt in ((session, " Yes."), (branch, " No, not."))
        ]
        answers = [stream.result(20) for stream in streams]
        for one, answer in zip((session, branch), answers, strict=True):
            assert list(answer.token_ids) == greedy(one.token_ids[:-10], 10)


def test_closing_a_branch_leaves_the_other(session, greedy):
    """The session at the server ends with the last branch, not before."""
    session.generate(PROMPT, max_new_tokens=4)
    branch = session.fork()
    branch.close()
    branch.close()
    answer = session.generate(max_new_tokens=4)
    assert list(answer.token_ids) == greedy(session.token_ids[:-4], 4)


def test_a_session_opens_with_what_it_needs(split, wire):
    """Room for every branch is reserved when the session opens."""
    Session.open(split.llm, 100, forks=2).close()
    assert wire.of(Open)[0].reserve_rows == 3 * 104


def test_calls_of_several_threads_come_one_after_the_other(session, greedy):
    """A session has one text; two threads cannot write into it at once."""
    session.generate(PROMPT, max_new_tokens=1)
    threads = [
        threading.Thread(target=session.generate, args=(" go",), kwargs={"max_new_tokens": 5})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert session.position == 25 + 1 + 3 * (3 + 5)
    assert list(session.token_ids[-5:]) == greedy(session.token_ids[:-5], 5)


# Faults


@pytest.mark.parametrize("number", range(2, 10))
def test_a_cut_in_a_session(split, wire, session, greedy, number):
    """A broken connection at any answer changes no token of what follows."""
    wire.cut_at = DOWN, number
    session.generate("q" * 300, max_new_tokens=4)
    session.generate(" more", max_new_tokens=4)
    session.rollback(303)
    session.generate(max_new_tokens=4)
    assert wire.connections == 2
    assert list(session.token_ids[-4:]) == greedy(session.token_ids[:-4], 4)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("number", range(2, 9))
def test_an_answer_that_is_cancelled_is_continued(split, wire, session, greedy, number, cut):
    """Cancelled in the prompt or in the answer, with or without a break: the next call goes on."""
    wire.hold_at = DOWN, number
    stream = session.stream("q" * 700, max_new_tokens=30, ignore_eos=True)
    assert wire.holding.wait(10)
    stream.cancel()
    with pytest.raises(CancelledError):
        stream.result(5)
    if cut:
        wire.cut_at = wire.hold_at
    split.on_loop(released(wire))
    done = session.position - 700
    assert 0 <= done < 30
    session.generate(max_new_tokens=30 - done, ignore_eos=True)
    assert list(session.token_ids[700:]) == greedy(session.token_ids[:700], 30)


@pytest.mark.parametrize("number", [2, 4, 6])
def test_going_back_and_branching_after_a_cancelled_answer(split, wire, session, greedy, number):
    """A cancelled answer leaves a session that can be rolled back and forked at once."""
    wire.hold_at = DOWN, number
    stream = session.stream("q" * 700, max_new_tokens=30, ignore_eos=True)
    assert wire.holding.wait(10)
    stream.cancel()
    split.on_loop(released(wire))
    with session.fork() as branch:
        session.rollback(300)
        for one in (session, branch):
            one.generate(" so", max_new_tokens=5)
            assert list(one.token_ids[-5:]) == greedy(one.token_ids[:-5], 5)


async def released(wire):
    """Let the held message arrive."""
    wire.release.set()


@pytest.fixture
def fragile(make_split):
    """A client that gives up soon."""
    return make_split(patience=Patience(open=0.3, recover=0.3))


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_an_outage_is_survived(fragile, wire, greedy, number):
    """The call fails with a clear error, the text stays, and the next call goes on."""
    with Session.open(fragile.llm, 1024) as session:
        break_down(wire, number)
        with pytest.raises(Unreachable, match="resumed later"):
            session.generate("q" * 700, max_new_tokens=20, ignore_eos=True)
        with pytest.raises(Unreachable):
            session.generate(max_new_tokens=1)
        with pytest.raises(Unreachable):
            session.resume()
        wire.down = False
        session.resume()
        done = session.position - 700
        session.generate(max_new_tokens=20 - done, ignore_eos=True)
        assert list(session.token_ids[700:]) == greedy(session.token_ids[:700], 20)


def test_going_back_during_an_outage(fragile, wire, greedy):
    """What needs no server works without one."""
    with Session.open(fragile.llm, 1024, forks=1) as session:
        break_down(wire, 6)
        with pytest.raises(Unreachable):
            session.generate("q" * 700, max_new_tokens=20, ignore_eos=True)
        session.rollback(350)
        wire.down = False
        session.generate(" so", max_new_tokens=5)
        assert list(session.token_ids[-5:]) == greedy(session.token_ids[:-5], 5)


def test_branches_resume_together(fragile, wire, greedy):
    """Branches that failed together go on together, over one new connection."""
    with Session.open(fragile.llm, 1024, forks=1) as session:
        session.generate(PROMPT, max_new_tokens=3)
        with session.fork() as branch:
            break_down(wire, wire.counts[DOWN] + 6)
            streams = [one.stream(" x", max_new_tokens=20) for one in (session, branch)]
            for stream in streams:
                with pytest.raises(Unreachable):
                    stream.result(10)
            wire.down = False
            streams = [one.stream(" y", max_new_tokens=5) for one in (session, branch)]
            for one, stream in zip((session, branch), streams, strict=True):
                assert list(stream.result(10).token_ids) == greedy(one.token_ids[:-5], 5)
    assert wire.connections == 2


def break_down(wire, number):
    """At answer `number` the connection breaks, and nobody answers any more."""
    note = wire.note

    def noted(connection, direction, data):
        count = note(connection, direction, data)
        if (direction, count) == (DOWN, number):
            wire.down = True
        return count

    wire.note = noted
    wire.cut_at = DOWN, number


# Bad input


def test_an_empty_session_has_nothing_to_continue(session):
    """The first call needs a prompt."""
    with pytest.raises(RequestError, match="give a prompt"):
        session.generate(max_new_tokens=1)


def test_a_session_that_is_full(split):
    """The numbers are named, and the session can still be used."""
    with Session.open(split.llm, 32) as session:
        with pytest.raises(PromptTooLong, match="grow to 35 tokens and holds 32"):
            session.generate(PROMPT, max_new_tokens=10)
        assert session.position == 0
        assert session.generate(PROMPT, max_new_tokens=7).token_ids


def test_a_session_longer_than_the_context(split):
    """What the model cannot hold is refused when the session opens."""
    with pytest.raises(PromptTooLong, match="4000 positions and the context is 2048"):
        Session.open(split.llm, 4000)


@pytest.mark.parametrize("position", [-1, 31])
def test_positions_that_do_not_exist(session, position):
    """A rollback goes back, never forward."""
    session.generate(PROMPT, max_new_tokens=5, ignore_eos=True)
    with pytest.raises(RequestError, match="the session has 30 tokens"):
        session.rollback(position)


def test_more_branches_than_reserved(session):
    """A fork beyond the reservation is refused and changes nothing."""
    session.generate(PROMPT, max_new_tokens=4)
    with session.fork():
        with pytest.raises(RequestError, match="opened for 1 forks"):
            session.fork()
        assert session.generate(max_new_tokens=2).token_ids


def test_ids_outside_the_vocabulary(session):
    """Token ids are checked before they enter the bottom."""
    with pytest.raises(RequestError, match="vocabulary of 96"):
        session.generate([5, 96])
    assert session.position == 0


def test_options_of_a_session(session):
    """One answer at a time, and only known options."""
    with pytest.raises(RequestError, match="use fork"):
        session.generate(PROMPT, n=2)
    with pytest.raises(ConfigError, match="top_k"):
        session.generate(PROMPT, topk=2)


def test_a_closed_session_says_so(split):
    """Every call is refused by name; a second close is harmless, also after the client's."""
    session = Session.open(split.llm, 64)
    session.generate(PROMPT, max_new_tokens=2)
    session.close()
    session.close()
    for call in (
        lambda: session.generate("x"),
        lambda: session.rollback(0),
        session.fork,
        session.resume,
    ):
        with pytest.raises(RequestError, match="the session is closed"):
            call()
    open_one = Session.open(split.llm, 64)
    split.llm.close()
    open_one.close()


# Chats


@pytest.fixture
def chat(split):
    """A conversation with a system message."""
    with Chat(split.llm, "Be brief.", 1500) as opened:
        yield opened


def fresh(greedy, split, messages, count):
    """What a fresh run answers to a conversation."""
    return greedy(split.llm.encode_chat(messages), count)


def test_a_chat_equals_fresh_runs(split, chat, greedy):
    """Every turn is what the whole conversation, rendered anew, would get."""
    for text in ("Hello there", "And who are you?", "Why?"):
        asked = [*chat.messages, {"role": "user", "content": text}]
        answer = chat.send(text, max_new_tokens=11).result(20)
        assert list(answer.token_ids) == fresh(greedy, split, asked, 11)
        assert chat.messages == [*asked, {"role": "assistant", "content": answer.text}]


def test_a_chat_sends_only_what_is_new(split, chat):
    """A later turn costs its own tokens and its answer, not the conversation."""
    chat.send("a" * 400, max_new_tokens=10, ignore_eos=True).result(20)
    before = chat.session.traffic.rows_up
    chat.send("b" * 10, max_new_tokens=10, ignore_eos=True).result(20)
    # One token that was not fed, ";u:" + text + ";a:", and all but the last of the answer.
    assert chat.session.traffic.rows_up - before <= 1 + 3 + 10 + 3 + 9


def test_a_turn_is_taken_back(split, chat, greedy):
    """After `undo` the conversation goes on as if the turn had not been."""
    chat.send("Hello there", max_new_tokens=8).result(20)
    kept = list(chat.messages)
    chat.send("Forget this", max_new_tokens=8).result(20)
    chat.undo()
    assert chat.messages == kept
    answer = chat.send("Go on", max_new_tokens=8).result(20)
    asked = [*kept, {"role": "user", "content": "Go on"}]
    assert list(answer.token_ids) == fresh(greedy, split, asked, 8)


def test_undo_never_takes_the_system_message(chat):
    """There is nothing to undo in a conversation that has only begun."""
    chat.undo()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_chat_starts_anew(split, chat, greedy):
    """`reset` forgets everything but the opening."""
    chat.send("Hello there", max_new_tokens=8).result(20)
    chat.reset()
    assert chat.session.position == 0
    answer = chat.send("Hi", max_new_tokens=8).result(20)
    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert list(answer.token_ids) == fresh(greedy, split, opening, 8)


@pytest.mark.parametrize("number", [2, 3, 6])
def test_a_cancelled_turn_is_not_kept(split, chat, wire, greedy, number):
    """The next turn is what a conversation without the cancelled one would get."""
    wire.hold_at = DOWN, number
    stream = chat.send("q" * 600, max_new_tokens=20, ignore_eos=True)
    assert wire.holding.wait(10)
    stream.cancel()
    answer = chat.send("q" * 590, max_new_tokens=8)
    split.on_loop(released(wire))
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q" * 590},
    ]
    assert list(answer.result(20).token_ids) == fresh(greedy, split, asked, 8)
    assert len(chat.messages) == 3


def test_a_chat_survives_an_outage(fragile, wire, greedy):
    """A turn that failed can be said again when the server is back."""
    with Chat(fragile.llm, None, 1500) as chat:
        chat.send("Hello there", max_new_tokens=5).result(20)
        asked = [*chat.messages, {"role": "user", "content": "And?"}]
        break_down(wire, wire.counts[DOWN] + 5)
        with pytest.raises(Unreachable):
            chat.send("And?", max_new_tokens=20, ignore_eos=True).result(20)
        wire.down = False
        answer = chat.send("And?", max_new_tokens=12)
        assert list(answer.result(20).token_ids) == fresh(greedy, fragile, asked, 12)


def test_chat_sampling_is_reproducible(split):
    """The same seed gives the same conversation."""

    def talk():
        with Chat(split.llm, max_tokens=500) as chat:
            for text in ("one", "two"):
                answer = chat.send(text, max_new_tokens=6, temperature=1.0, seed=3).result(20)
                assert answer.finish_reason in (FinishReason.LENGTH, FinishReason.EOS)
            return chat.messages

    assert talk() == talk()


def test_rows_on_the_wire_are_all_different_releases(split, chat, wire):
    """A conversation without breaks and rollbacks sends every position once."""
    chat.send("Hello there", max_new_tokens=5, ignore_eos=True).result(20)
    positions = [
        (segment.sequence, position)
        for append in wire.of(Append)
        for segment in append.segments
        for position in range(segment.start, segment.end)
    ]
    assert len(positions) == len(set(positions))
