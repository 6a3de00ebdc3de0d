"""The grammar of the demo model's training text."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts.demo_notes import (
    CONDITIONS,
    KINDS,
    LAST_YEAR,
    MONTHS,
    PENICILLIN,
    Draw,
    document,
    write_day_list,
    write_follow_up,
    write_letter,
    write_note,
    write_paragraph,
    write_summary,
    written_date,
)

seeds = st.integers(min_value=0, max_value=2**32)
indices = st.integers(min_value=0, max_value=10**6)
documents = st.builds(document, seeds, indices)

DATE = re.compile(rf"\b(\d+) ({'|'.join(MONTHS)}) (\d{{4}})\b")
DIGEST = "b2c081acc907fd0901076ef5d983dd8150150abf94580a2a375d16e1bd73573c"
"""SHA-256 of the first 200 documents of seed 1."""


def dates_in(text):
    """All dates that are written in a text, in order."""
    return [
        dt.date(int(year), MONTHS.index(month) + 1, int(day))
        for day, month, year in DATE.findall(text)
    ]


def written_forms(sample):
    """Every kind of text about the visit of a sample."""
    draw = Draw(1, 1)
    writers = (write_note, write_paragraph, write_follow_up, write_letter)
    return [write(draw, sample.visit) for write in writers] + [write_summary(sample.visit)]


@given(seeds, indices)
def test_same_seed_and_index_give_the_same_document(seed, index):
    """A document depends on nothing but its seed and its index."""
    assert document(seed, index) == document(seed, index)


def test_stream_is_the_one_that_was_trained_on():
    """The grammar has not changed since the packaged model was trained: a change asks for another."""
    texts = "\n".join(document(1, index).whole_text for index in range(200))

    assert hashlib.sha256(texts.encode()).hexdigest() == DIGEST


def test_seeds_give_different_streams():
    """Two seeds share no document among their first hundred."""
    first = {document(1, index).whole_text for index in range(100)}
    second = {document(2, index).whole_text for index in range(100)}

    assert len(first & second) <= 2, "only the short answers of chats may coincide"


@given(documents)
def test_no_slot_is_left_unfilled(sample):
    """No text shows a slot, a missing value or a gap."""
    for text in (sample.whole_text, *written_forms(sample)):
        assert not re.search(r"[{}]|None|  | [.,]|\.\.|\n\n\n", text)
        assert text == text.strip()


@given(documents)
def test_next_visit_follows_the_visit(sample):
    """The next visit lies after the visit, in the month that the condition asks for."""
    visit = sample.visit
    months = 12 * (visit.next_date.year - visit.date.year) + visit.next_date.month
    assert visit.date < visit.next_date
    assert months - visit.date.month == visit.condition.months


@given(documents)
def test_texts_hold_only_the_dates_of_their_visit(sample):
    """Each date in a text is a real one, and the two of the visit come in order."""
    visit = sample.visit
    for text in written_forms(sample):
        dates = dates_in(text)
        assert dates == sorted(dates)
        assert set(dates) <= {visit.date, visit.next_date}
        assert all(date.year <= LAST_YEAR + 1 for date in dates)


@given(documents)
def test_pronouns_fit_the_patient(sample):
    """A note about a woman never says he, his or him, and the other way round."""
    wrong = (
        r"\b(he|his|him|Mr|man|male)\b"
        if sample.visit.patient.woman
        else r"\b(she|her|Ms|woman|female)\b"
    )
    for text in written_forms(sample):
        assert not re.search(wrong, text, flags=re.IGNORECASE)


@given(documents)
def test_patient_and_condition_fit(sample):
    """Age and sex lie in what the condition allows."""
    patient, condition = sample.visit.patient, sample.visit.condition
    youngest, oldest = condition.ages

    assert youngest <= patient.age <= oldest
    assert patient.woman or not condition.women_only


@given(documents)
def test_medicine_fits_condition_and_allergy(sample):
    """Only the condition's own medicines are given, with their dose, and no allergen among them."""
    visit = sample.visit

    assert visit.treatment in visit.condition.treatments
    assert not (visit.allergy == PENICILLIN and visit.treatment.penicillin)
    assert visit.treatment.order in write_letter(Draw(1, 1), visit)


@given(documents)
def test_one_side_of_the_body(sample):
    """A text about a left knee never mentions a right one."""
    other = "right" if sample.visit.side == "left" else "left"
    for text in written_forms(sample):
        assert not re.search(rf"\b{other}\b", text)


@given(documents)
def test_fever_fits_the_condition(sample):
    """The temperature is that of a fever exactly when the condition comes with one."""
    assert (sample.visit.temperature >= 380) == sample.visit.condition.fever


@given(documents)
def test_chats_take_turns(sample):
    """A chat starts with the user, ends with the assistant, and has no empty turn."""
    roles = [turn.role for turn in sample.turns]

    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert (sample.kind == "chat") == bool(roles)
    assert all(turn.text for turn in sample.turns)


@given(seeds)
def test_day_list_names_everyone_twice(seed):
    """Everyone who was announced was seen, with the same surname and age."""
    text = write_day_list(Draw(seed, 1), document(seed, 0).visit)
    announced = re.findall(r"^\w+ (\w+), (?:fe)?male, (\d+)$", text, flags=re.MULTILINE)
    seen = re.findall(r"^M[rs] (\w+), an? (\d+)-year-old", text, flags=re.MULTILINE)

    assert 3 <= len(announced) <= 6
    assert sorted(announced) == sorted(seen)


def test_every_kind_and_condition_occurs():
    """A few hundred documents show each kind of text and each condition."""
    drawn = [document(3, index) for index in range(600)]

    assert {sample.kind for sample in drawn} == set(KINDS)
    assert {sample.visit.condition.name for sample in drawn} == {each.name for each in CONDITIONS}


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
def test_conditions_leave_a_choice_to_the_allergic(condition):
    """Each condition has a treatment that is no penicillin, and enough findings and denials."""
    assert any(not each.penicillin for each in condition.treatments)
    assert len(condition.findings) >= 3
    assert len(condition.denied) >= 2


def test_information_of_the_choices_is_added_up():
    """`Draw.nats` is minus the log of the probability of what was drawn."""
    draw = Draw(1, 2)
    draw.one("abcd")
    draw.some("abcd", 2)
    draw.ordered("abcd", 2)
    draw.number(1, 5)
    draw.chance(50)

    assert draw.nats == pytest.approx(math.log(4 * 6 * 12 * 5 * 2))


def test_dates_are_written_out():
    """A date reads day, month, year, without leading zeros."""
    assert written_date(dt.date(2032, 5, 4)) == "4 May 2032"
