"""Prompts leave with placeholders and answers come back without, through the real split model."""

from __future__ import annotations

import random
import re

import pytest
from tests.conftest import character_tokenizer

import fedsea.client.generation
import fedsea.client.sessions
from fedsea.client.huggingface import SplitForCausalLM
from fedsea.client.llm import LLM
from fedsea.client.sampling import FinishReason, Sampler, sample_batch
from fedsea.client.sessions import Chat, Session
from fedsea.errors import ConfigError, RequestError
from fedsea.privacy.placeholders.config import MODES, Placeholders

NOTE = "Eva Novak called on 12 March 1984 from +49 170 1234567. Eva Novak is well"
VALUES = ["Eva", "Novak", "March 1984", "1234567"]


class Echo(Sampler):
    """Draws as the model says, and then says its prompt instead: an echo of what it was sent."""

    __slots__ = ("echo",)

    def __init__(self, params, prompt_ids, *args, **options):
        super().__init__(params, prompt_ids, *args, **options)
        self.echo = list(prompt_ids)

    def say(self) -> int:
        """Replace the id drawn last."""
        self._generated[-1] = self.echo[(len(self._generated) - 1) % len(self.echo)]
        return self._generated[-1]


@pytest.fixture
def echo(monkeypatch):
    """Make the model repeat its prompt; returns the prompts that it was sent, as text."""
    sent: list[str] = []
    tokenizer = character_tokenizer()

    class Heard(Echo):
        __slots__ = ()

        def __init__(self, params, prompt_ids, *args, **options):
            super().__init__(params, prompt_ids, *args, **options)
            sent.append(tokenizer.decode(list(prompt_ids)))

    def say(samplers, logits):
        sample_batch(samplers, logits)
        return [sampler.say() for sampler in samplers]

    monkeypatch.setattr(fedsea.client.generation, "Sampler", Heard)
    monkeypatch.setattr(fedsea.client.sessions, "Sampler", Heard)
    monkeypatch.setattr("fedsea.client.local.sample_batch", say)
    monkeypatch.setattr("fedsea.client.sampling.sample_batch", say)
    return sent


@pytest.fixture
def connect(make_split):
    """A client that replaces spans, with draws that repeat."""

    def make(mode: str = "pseudonym", **options) -> LLM:
        chosen = Placeholders(mode=mode, rng=random.Random(3), **options)
        llm: LLM = make_split(placeholders=chosen).llm
        return llm

    return make


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_has_the_values_and_the_prompt_has_not(connect, echo, mode):
    """What the server's side is sent has no value; what the caller gets has all of them."""
    completion = connect(mode).generate(NOTE, max_new_tokens=200, ignore_eos=True)
    assert echo
    assert not [value for value in VALUES if value in echo[0]]
    assert completion.text.startswith(NOTE)
    assert completion.substituted == {"name": 2, "date": 1, "phone": 1}


def test_a_stream_restores_what_its_pieces_cut(connect, echo):
    """Every piece is one character of an answer, so every substitute is cut."""
    llm = connect()
    stream = llm.stream(NOTE, max_new_tokens=200, ignore_eos=True)
    pieces = list(stream)
    assert "".join(pieces) == stream.result().text
    assert stream.result().text.startswith(NOTE)
    assert len(pieces) > 40


def test_stop_strings_are_those_of_the_caller(connect, echo):
    """A stop string may be a value: it is looked for in the restored text."""
    completion = connect().generate(NOTE, max_new_tokens=200, ignore_eos=True, stop=("Novak",))
    assert completion.text == "Eva "
    assert completion.finish_reason is FinishReason.STOP_STRING


def test_a_session_keeps_one_mapping(connect, echo):
    """A name of the first prompt is the same invented name in the second, and in a fork."""
    with Session.open(connect(), 1024, forks=1) as session:
        session.generate("Ask Eva Novak.", max_new_tokens=4, ignore_eos=True)
        session.generate(" NOVAK said", max_new_tokens=4, ignore_eos=True)
        invented = re.findall(r"Ask \w+ (\w+)\.", echo[0])[0]
        assert invented.upper() in echo[1]
        with session.fork() as fork:
            assert fork.generate(" Novak", max_new_tokens=4).substituted["name"] == 3
        assert "NOVAK" not in echo[-1].upper()


@pytest.mark.parametrize("mode", MODES)
def test_a_chat_sends_its_turns_once(connect, echo, mode):
    """Answers are shown with values and kept on the wire as they were written: nothing goes back."""
    llm = connect(mode)
    with Chat(llm, "You are Dr Eva Novak.", max_tokens=1500) as chat:
        first = chat.send("Is Adam Kowalski in?", max_new_tokens=120, ignore_eos=True).result(20)
        before = chat.session.position
        assert "Adam Kowalski" in first.text
        assert "Eva Novak" in chat.messages[0]["content"]
        chat.send("And Novak?", max_new_tokens=4, ignore_eos=True).result(20)
        assert echo[1].startswith(echo[0])
        assert chat.session.position > before
        assert not [name for name in ("Novak", "Kowalski") if name in echo[1]]


def test_without_anything_to_replace_nothing_changes(connect, split):
    """A prompt without spans gives the same answer as a client without placeholders."""
    plain = split.llm.generate("what did he say?", max_new_tokens=20)
    replaced = connect().generate("what did he say?", max_new_tokens=20)
    assert (replaced.text, replaced.token_ids) == (plain.text, plain.token_ids)
    assert replaced.substituted == {}


def test_token_ids_are_refused(connect):
    """Nothing can be found in ids, so they are not let through."""
    llm = connect()
    with pytest.raises(RequestError, match="give the text"):
        llm.generate([5, 6, 7])
    with pytest.raises(RequestError, match="give the text"):
        llm.stream([5, 6, 7])
    with Session.open(llm, 64) as session, pytest.raises(RequestError, match="give the text"):
        session.generate([5, 6, 7])
    with pytest.raises(ConfigError, match="use LLM, Session or Chat"):
        SplitForCausalLM.from_llm(llm)
