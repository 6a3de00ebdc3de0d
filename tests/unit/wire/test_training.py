"""Training sessions: the life of a step, each rule broken on both sides, random dialogues."""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.wire.pair import HIDDEN_SIZE, ConnectionPair, an_open, zeros

from fedsea.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from fedsea.wire.codecs import VALUE_CODECS, Codec
from fedsea.wire.connection import Connection
from fedsea.wire.framing import encode_event
from fedsea.wire.limits import DEFAULT_LIMITS, UINT32_MAX, Limits
from fedsea.wire.messages import (
    Activations,
    AdamW,
    Append,
    Backward,
    Begin,
    Close,
    Discard,
    Event,
    Forward,
    Gradients,
    Lora,
    Notice,
    NoticeKind,
    Opened,
    OpenTraining,
    Output,
    Reset,
    Role,
    Save,
    Saved,
    Segment,
    Step,
    Stepped,
)
from fedsea.wire.states import State

LORA = Lora(targets=("q_proj", "v_proj"), blocks=(2, 5))


def an_opening(
    up: Codec = Codec.FP32, down: Codec = Codec.FP32, gradient: Codec = Codec.FP32
) -> OpenTraining:
    """A valid OpenTraining."""
    return OpenTraining("f00d", 2, 6, up, down, gradient, "clinic", lora=LORA)


def training(
    limits: Limits = DEFAULT_LIMITS, opening: OpenTraining | None = None
) -> ConnectionPair:
    """Both sides of a training session that has begun."""
    pair = ConnectionPair(limits)
    pair.client_sends(opening or an_opening())
    pair.server_sends(Opened("s1", 0, 7))
    return pair


def refused(
    pair: ConnectionPair, sender: Role, event: Event, match: str, limits: Limits = DEFAULT_LIMITS
) -> None:
    """Both sides refuse `event`: its sender stays as it was, its receiver fails."""
    is_client = sender is Role.CLIENT
    here, there = (pair.client, pair.server) if is_client else (pair.server, pair.client)
    before = (here.state, here.pending, here.forwards)
    with pytest.raises(LocalProtocolError, match=match):
        here.send(event)
    assert (here.state, here.pending, here.forwards) == before
    with pytest.raises(RemoteProtocolError, match=match):
        there.receive(encode_event(event, limits))
    assert there.state is State.FAILED


def test_a_step_of_two_batches():
    """Two Forwards in flight, their Backwards in the other order, one Step, one Save, the end."""
    pair = training()
    assert pair.client.state is State.TRAINING
    pair.client_sends(Forward(0, (3, 2), zeros(5)), Forward(1, (4,), zeros(4)))
    pair.server_sends(Activations(0, zeros(5)), Activations(1, zeros(4)))
    assert pair.server.forwards == {0, 1}
    pair.client_sends(Backward(1, zeros(4)), Backward(0, zeros(5)))
    assert pair.server.forwards == set()
    pair.client_sends(Step(8, 1e-3, 1.0), Save(8))
    pair.server_sends(Gradients(1, zeros(4)), Gradients(0, zeros(5)))
    pair.server_sends(Stepped(8, 0.5, True), Saved(8))
    pair.client_sends(Close())
    assert pair.server.state is State.CLOSING


def test_answers_may_arrive_after_close():
    """What was on its way when the client closed is still received."""
    pair = training()
    pair.client_sends(Forward(0, (1,), zeros(1), no_grad=True), Step(8, 0.0), Save(8), Close())
    pair.server_sends(Activations(0, zeros(1)), Stepped(8, math.inf, False), Saved(8, "disk full"))


def test_an_evaluation_is_not_open():
    """A Forward without gradients takes no Backward and does not hold up a Step."""
    pair = training()
    pair.client_sends(Forward(0, (2,), zeros(2), no_grad=True))
    assert pair.client.forwards == set()
    pair.client_sends(Step(8, 1e-3))
    refused(pair, Role.CLIENT, Backward(0, zeros(2)), "not open")


def test_discard_and_reset_close_what_is_open():
    """Both leave the answers that are owed as they are."""
    pair = training()
    pair.client_sends(*(Forward(number, (1,), zeros(1)) for number in range(3)))
    pair.client_sends(Discard(1))
    assert pair.server.forwards == {0, 2}
    pair.client_sends(Reset())
    assert pair.server.forwards == set()
    pair.server_sends(*(Activations(number, zeros(1)) for number in range(3)))
    assert pair.client.pending == 0


def test_narrow_rows_up_have_narrow_gradients():
    """Counts of a narrow mechanism go up; gradients come back as values of the same width."""
    opening = replace(
        an_opening(Codec.COUNTS, Codec.FP16, Codec.BF16),
        up_width=3, up_levels=5, up_scale=1.0, projection="p",
    )  # fmt: skip
    pair = training(opening=opening)
    pair.client_sends(Forward(0, (2,), bytes(2 * 2)))
    pair.server_sends(Activations(0, bytes(2 * HIDDEN_SIZE * 2)))
    pair.client_sends(Backward(0, bytes(2 * HIDDEN_SIZE * 2)))
    pair.server_sends(Gradients(0, bytes(2 * 3 * 2)))
    assert opening.gradients_format(HIDDEN_SIZE).width == 3
    assert opening.backward_format(HIDDEN_SIZE).width == HIDDEN_SIZE


def test_a_notice_arrives_in_training():
    """A server that drains says so; the session goes on."""
    pair = training()
    pair.server_sends(Notice(NoticeKind.DRAINING, "move"))
    assert pair.client.state is State.TRAINING


@pytest.mark.parametrize(
    "event",
    [Begin(0, 1), Append(0, (Segment(0, 0, 1),), zeros(1)), an_opening()],
    ids=lambda event: type(event).__name__,
)
def test_inference_is_refused_in_training(event):
    """A training session has no sequences, and is opened once."""
    refused(training(), Role.CLIENT, event, "not allowed while the session is training")


@pytest.mark.parametrize(
    "event",
    [Forward(0, (1,), zeros(1)), Backward(0, b""), Discard(0), Reset(), Step(1, 0.1), Save(0)],
    ids=lambda event: type(event).__name__,
)
@pytest.mark.parametrize("state", ["opening", "active", "joining"])
def test_training_is_refused_elsewhere(event, state):
    """Training needs OpenTraining and its Opened: the step to go on from is not known before."""
    pair = ConnectionPair()
    if state == "active":
        pair.opened(4)
    elif state == "joining":
        pair.client_sends(an_opening())
    else:
        pair.client_sends(an_open())
    refused(pair, Role.CLIENT, event, f"not allowed while the session is {state}")


OPENINGS = [
    ({"protocol": 2}, "protocol 2 and 1"),
    ({"first_block": 6}, "no span"),
    ({"adapter": ""}, "no name"),
    ({"adapter": "a\nb"}, "control characters"),
    ({"adapter": "a" * 600}, "over the limit"),
    ({"gradient_codec": Codec.COUNTS}, "counts go up only"),
    ({"down_codec": Codec.COUNTS}, "counts go up only"),
    ({"up_levels": 4}, "levels and scale"),
    ({"up_width": 3}, "need a projection"),
    ({"up_width": 5, "projection": "p"}, "do not fit"),
    ({"prompt_rows": UINT32_MAX}, "prompt rows"),
    ({"optimizer": AdamW(beta1=1.0)}, "betas"),
    ({"optimizer": AdamW(beta2=math.inf)}, "betas"),
    ({"optimizer": AdamW(beta1=1 - 1e-9)}, "betas"),
    ({"optimizer": AdamW(eps=0.0)}, "eps"),
    ({"optimizer": AdamW(eps=1e-46)}, "eps"),
    ({"optimizer": AdamW(eps=1e300)}, "eps"),
    ({"optimizer": AdamW(weight_decay=1e300)}, "weight decay"),
    ({"optimizer": AdamW(weight_decay=-1.0)}, "weight decay"),
    ({"optimizer": AdamW(weight_decay=math.nan)}, "weight decay"),
    ({"resume_steps": ()}, "steps to resume from"),
    ({"resume_steps": tuple(range(65))}, "steps to resume from"),
    ({"weight": 0.0}, "weight"),
    ({"weight": math.inf}, "weight"),
    ({"lora": replace(LORA, rank=0)}, "rank"),
    ({"lora": replace(LORA, alpha=0.0)}, "alpha"),
    ({"lora": replace(LORA, alpha=math.nan)}, "alpha"),
    ({"lora": replace(LORA, alpha=1e300)}, "alpha"),
    ({"lora": replace(LORA, dropout=1.0)}, "dropout"),
    ({"lora": replace(LORA, dropout=1 - 1e-12)}, "dropout"),
    ({"lora": replace(LORA, targets=())}, "targets"),
    ({"lora": replace(LORA, targets=("q",) * 65)}, "targets"),
    ({"lora": replace(LORA, targets=("",))}, "target has no name"),
    ({"lora": replace(LORA, targets=("\x1b",))}, "control characters"),
    ({"lora": replace(LORA, blocks=(6,))}, "outside 2 to 5"),
    ({"lora": replace(LORA, blocks=(2,) * 1025)}, "at most 1024"),
]


@pytest.mark.parametrize(("changes", "match"), OPENINGS)
def test_openings_that_mean_nothing(changes, match):
    """Each value out of range is refused before a server builds anything for it."""
    refused(ConnectionPair(), Role.CLIENT, replace(an_opening(), **changes), match)


def test_frozen_trunk_needs_no_lora():
    """A run without an adapter and without prompt rows passes rows and gradients through."""
    pair = training(opening=replace(an_opening(), lora=None))
    pair.client_sends(Forward(0, (1,), zeros(1)))


FORWARDS = [
    (Forward(3, (1,), zeros(1)), "ids grow"),
    (Forward(4, (), b""), "0 sequences"),
    (Forward(4, (1, 0), zeros(1)), "a sequence of no rows"),
    (Forward(4, (2**20 + 1,), b""), "a sequence of no rows or of more than"),
    (Forward(4, (5000, 5000), b""), "over the limit of 8192"),
    (Forward(4, (2,), zeros(1)), "16 bytes of rows where 32"),
    (Forward(4, (1,) * 257, zeros(257)), "257 sequences"),
    (Backward(9, zeros(1)), "not open"),
    (Backward(3, zeros(2)), "32 bytes of rows where 16"),
    (Discard(9), "not open"),
    (Step(8, 1e-3), "1 Forwards are open"),
]


@pytest.mark.parametrize(("event", "match"), FORWARDS, ids=lambda value: str(value)[:40])
def test_events_that_do_not_fit_what_came_before(event, match):
    """With Forward 3 of one row open and answered, each of these is a mistake of the client."""
    pair = training()
    pair.client_sends(Forward(3, (1,), zeros(1)))
    pair.server_sends(Activations(3, zeros(1)))
    refused(pair, Role.CLIENT, event, match)


STEPS = [
    (Step(0, 1e-3), "number 0"),
    (Step(1, -1.0), "learning rate"),
    (Step(1, math.nan), "learning rate"),
    (Step(1, 3e38), "learning rate"),
    (Step(1, 1e3), "times the weight decay"),
    (Step(1, 1.0, math.inf), "largest norm"),
    (Step(1, 1.0, 1.0, 0.0), "scale"),
    (Step(1, 1.0, 1.0, 1e-300), "scale"),
    (Step(1, 1.0, 1.0, 1e300), "scale"),
    (Step(1, 1.0, 1.0, math.nan), "scale"),
]


@pytest.mark.parametrize(("event", "match"), STEPS, ids=lambda value: str(value)[:40])
def test_steps_that_mean_nothing(event, match):
    """Numbers of a Step are in range before an optimizer sees them."""
    refused(training(), Role.CLIENT, event, match)


def test_a_backward_needs_its_activations():
    """A gradient cannot be known before the loss is."""
    pair = training()
    pair.client_sends(Forward(0, (1,), zeros(1)))
    refused(pair, Role.CLIENT, Backward(0, zeros(1)), "wait for them")


def test_one_backward_for_a_forward():
    """The second is refused, for its activations are gone."""
    pair = training()
    pair.client_sends(Forward(0, (1,), zeros(1)))
    pair.server_sends(Activations(0, zeros(1)))
    pair.client_sends(Backward(0, zeros(1)))
    refused(pair, Role.CLIENT, Backward(0, zeros(1)), "not open")


def test_open_forwards_are_bounded():
    """A client cannot make the server keep more than was agreed; an evaluation keeps nothing."""
    limits = Limits(max_forwards=2)
    pair = training(limits)
    for number in range(2):
        pair.client_sends(Forward(number, (1,), zeros(1)))
        pair.server_sends(Activations(number, zeros(1)))
    pair.client_sends(Forward(2, (1,), zeros(1), no_grad=True))
    refused(pair, Role.CLIENT, Forward(3, (1,), zeros(1)), "2 Forwards are open", limits)


def test_unanswered_events_are_bounded():
    """Of every kind that is answered."""
    limits = Limits(max_pending=2)
    for event in (Forward(9, (1,), zeros(1)), Step(9, 0.1), Save(9)):
        pair = training(limits)
        pair.client_sends(Save(1), Save(2))
        refused(pair, Role.CLIENT, event, "2 events are unanswered", limits)


def test_answers_have_to_fit_a_message():
    """A Forward whose gradients would be too large is refused at once, an evaluation is not."""
    limits = Limits(max_message_bytes=220)
    opening = an_opening(Codec.INT8, Codec.INT8, Codec.FP32)
    rows = bytes(10 * Codec.INT8.row_bytes(HIDDEN_SIZE))
    pair = training(limits, opening)
    pair.client_sends(Forward(0, (10,), rows, no_grad=True))
    refused(pair, Role.CLIENT, Forward(1, (10,), rows), "send it in parts", limits)


ANSWERS = [
    (Activations(1, zeros(1)), "came before Activations 0"),
    (Gradients(0, zeros(1)), "came before Activations 0"),
    (Stepped(0, 1.0, True), "came before Activations 0"),
    (Saved(0), "came before Activations 0"),
    (Activations(0, zeros(2)), "32 bytes of rows where 16"),
]


@pytest.mark.parametrize(("event", "match"), ANSWERS, ids=lambda value: str(value)[:40])
def test_answers_come_in_order_and_whole(event, match):
    """Forward 0 of one row waits; anything but its Activations is a mistake of the server."""
    pair = training()
    pair.client_sends(Forward(0, (1,), zeros(1)))
    refused(pair, Role.SERVER, event, match)


@pytest.mark.parametrize("event", [Activations(0, b""), Stepped(1, 1.0, True), Saved(1)])
def test_answers_to_nothing(event):
    """Each event is answered once."""
    refused(training(), Role.SERVER, event, "answers nothing")


@pytest.mark.parametrize(
    ("event", "match"),
    [
        (Stepped(8, math.nan, False), "no norm"),
        (Stepped(8, -1.0, True), "no norm"),
        (Stepped(8, math.inf, True), "if, and only if"),
        (Stepped(8, 1.0, False), "if, and only if"),
    ],
)
def test_a_step_is_applied_when_its_gradients_are_finite(event, match):
    """What Stepped says is of one piece."""
    pair = training()
    pair.client_sends(Step(8, 0.1))
    refused(pair, Role.SERVER, event, match)


def test_a_problem_is_one_line():
    """What a server says about a disk cannot forge lines in the client's log."""
    pair = training()
    pair.client_sends(Save(8))
    refused(pair, Role.SERVER, Saved(8, "disk\nfull"), "control characters")


def test_output_is_no_answer_of_training():
    """Outputs belong to Appends."""
    refused(training(), Role.SERVER, Output(0, (), b""), "not allowed while")


LIMITS = Limits(max_rows_per_message=12, max_segments=3, max_pending=3, max_forwards=2)
counts = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
any_counts = st.lists(st.integers(0, 6), max_size=4).map(tuple)
numbers = st.integers(0, 12)
any_rows = st.integers(0, 12)


class Training(RuleBasedStateMachine):
    """Valid events keep client, server and a plain model in step; any event is judged alike."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[int, tuple[int, bool]] = {}  # rows, answered
        self.owed: deque[tuple[type[Event], int, int]] = deque()
        self.next_id = 0

    @initialize(down=st.sampled_from(VALUE_CODECS), gradient=st.sampled_from(VALUE_CODECS))
    def begin(self, down: Codec, gradient: Codec) -> None:
        self.down, self.gradient = down, gradient
        self.pair = training(LIMITS, an_opening(Codec.FP32, down, gradient))

    @precondition(lambda self: len(self.owed) < 3 and len(self.open) < 2)
    @rule(counts=counts, no_grad=st.booleans(), gap=st.integers(1, 3))
    def forward(self, counts: tuple[int, ...], no_grad: bool, gap: int) -> None:
        rows = sum(counts)
        self.pair.client_sends(Forward(self.next_id, counts, zeros(rows), no_grad))
        if not no_grad:
            self.open[self.next_id] = (rows, False)
        self.owed.append((Activations, self.next_id, rows))
        self.next_id += gap

    @precondition(lambda self: len(self.owed) < 3 and any(done for _, done in self.open.values()))
    @rule(data=st.data())
    def backward(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([n for n, (_, done) in self.open.items() if done]))
        rows, _ = self.open.pop(number)
        self.pair.client_sends(Backward(number, zeros(rows, self.gradient)))
        self.owed.append((Gradients, number, rows))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        del self.open[number]
        self.pair.client_sends(Discard(number))

    @rule()
    def reset(self) -> None:
        self.open.clear()
        self.pair.client_sends(Reset())

    @precondition(lambda self: len(self.owed) < 3 and not self.open)
    @rule(number=st.integers(1, 9))
    def step(self, number: int) -> None:
        self.pair.client_sends(Step(number, 0.1))
        self.owed.append((Stepped, number, 0))

    @precondition(lambda self: len(self.owed) < 3)
    @rule(number=st.integers(0, 9))
    def save(self, number: int) -> None:
        self.pair.client_sends(Save(number))
        self.owed.append((Saved, number, 0))

    @precondition(lambda self: self.owed)
    @rule()
    def answer(self) -> None:
        kind, number, rows = self.owed.popleft()
        if kind is Activations:
            self.pair.server_sends(Activations(number, zeros(rows, self.down)))
            if number in self.open:
                self.open[number] = (rows, True)
        elif kind is Gradients:
            self.pair.server_sends(Gradients(number, zeros(rows, self.gradient)))
        else:
            self.pair.server_sends(Stepped(number, 1.0, True) if kind is Stepped else Saved(number))

    @rule(
        event=st.one_of(
            st.builds(lambda n, c, r, g: Forward(n, c, zeros(r), g), numbers, any_counts, any_rows,
                      st.booleans()),
            st.builds(lambda n, r: Backward(n, zeros(r)), numbers, any_rows),
            st.builds(Discard, numbers),
            st.builds(Step, numbers, st.sampled_from([0.1, -1.0])),
            st.builds(Save, numbers),
            st.builds(Begin, numbers, numbers),
            st.just(Close()),
        )
    )  # fmt: skip
    def client_event_is_judged_alike(self, event: Event) -> None:
        self._judged_alike(self.pair.client, self.pair.server, event)

    @rule(
        event=st.one_of(
            st.builds(lambda n, r: Activations(n, zeros(r)), numbers, any_rows),
            st.builds(lambda n, r: Gradients(n, zeros(r)), numbers, any_rows),
            st.builds(Stepped, numbers, st.sampled_from([1.0, math.inf]), st.booleans()),
            st.builds(Saved, numbers),
        )
    )
    def server_event_is_judged_alike(self, event: Event) -> None:
        self._judged_alike(self.pair.server, self.pair.client, event)

    @invariant()
    def sides_agree_with_the_model(self) -> None:
        for side in (self.pair.client, self.pair.server):
            assert side.forwards == set(self.open)
            assert side.pending == len(self.owed)

    def _judged_alike(self, sender: Connection, receiver: Connection, event: Event) -> None:
        here, there = copy.deepcopy(sender), copy.deepcopy(receiver)
        local = _fault(LocalProtocolError, here, event)
        remote = _fault(RemoteProtocolError, there, event)
        assert local == remote
        if local is None:
            assert _view(here) == _view(there)
        else:
            assert _view(here) == _view(sender)
            assert there.state is State.FAILED


def _fault(kind: type[ProtocolError], side: Connection, event: Event) -> str | None:
    """The message of the expected error, None when there is none."""
    try:
        if kind is LocalProtocolError:
            side.send(event)
        else:
            side.receive(encode_event(event, LIMITS))
    except kind as error:
        return str(error)
    return None


def _view(side: Connection) -> object:
    return side.state, side.pending, side.forwards


Training.TestCase.settings = settings(max_examples=60, stateful_step_count=25, derandomize=True)
TestTraining = Training.TestCase
