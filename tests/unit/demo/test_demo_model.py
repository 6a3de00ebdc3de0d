"""The packaged demo model and the record of its training."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from scripts.demo_notes import CONDITIONS, document
from scripts.train_demo_model import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    USER,
    Phase,
    Recipe,
    curve,
    encode,
    greedy,
    held_out_loss,
    training_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsea import demo
from fedsea.errors import CheckpointError

MEBIBYTE = 2**20
DATE = r"\d{1,2} [A-Z][a-z]+ 203\d"


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer as a user loads it."""
    return AutoTokenizer.from_pretrained(demo.model_path())


@pytest.fixture(scope="module")
def model():
    """The model as a user loads it."""
    return AutoModelForCausalLM.from_pretrained(demo.model_path()).eval()


@pytest.fixture(scope="module")
def training():
    """The record of the training."""
    return json.loads((demo.model_path() / "training.json").read_text(encoding="utf-8"))


def continued(model, tokenizer, prompt):
    """A prompt with the greedy text after it."""
    new = greedy(model, tokenizer.encode(prompt))
    assert new[-1] == tokenizer.eos_token_id, "the text comes to an end by itself"
    return prompt + tokenizer.decode(new, skip_special_tokens=True)


def answered(model, tokenizer, messages):
    """The greedy answer to the last message of a chat."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    new = greedy(model, tokenizer.encode(text, add_special_tokens=False))
    return tokenizer.decode(new, skip_special_tokens=True)


def test_checkpoint_is_small():
    """All files together stay below four megabytes: the wheel carries them."""
    assert sum(path.stat().st_size for path in demo.model_path().iterdir()) < 4 * MEBIBYTE


def test_missing_checkpoint_is_said_so(monkeypatch, tmp_path):
    """A package without the model's files says what is missing and what to do."""
    monkeypatch.setattr(demo, "files", lambda _: tmp_path)

    with pytest.raises(CheckpointError, match=r"no demo model in .*: install fedsea again"):
        demo.model_path()


def test_tensors_are_bfloat16_and_load_as_float32(model):
    """The file holds bfloat16; the config asks for float32, which every backend computes alike."""
    with safe_open(demo.model_path() / "model.safetensors", framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118

    assert kinds == {"BF16"}
    assert model.dtype == torch.float32


def test_model_can_be_cut(model):
    """It has blocks enough for a bottom, a trunk and a top of two each."""
    assert model.config.model_type == "llama"
    assert model.config.num_hidden_layers >= 6


def test_visit_note_has_all_sections(model, tokenizer):
    """The greedy note about a named patient has every section, in order, and keeps to its facts."""
    note = continued(model, tokenizer, "Visit note\nPatient: Maria Okafor")

    sections = re.fullmatch(
        r"Visit note\nPatient: Maria Okafor\nSex: female\nAge: \d\d\n"
        rf"Date: {DATE}\nDoctor: [A-Z][a-z]+\n\n"
        r"Reason: .+\.\nHistory: (?:Ms Okafor|The patient) reports .+\.\n"
        r"Examination: Temperature 3\d\.\d C, pulse \d+, blood pressure \d+/\d+\. .+\.\n"
        rf"Assessment: .+\.\nPlan: .+\.\nNext visit: {DATE}",
        note,
    )
    assert sections
    assert not re.search(r"\b(he|his|him)\b", note)


@pytest.mark.parametrize(
    ("reason", "side"),
    [("Sore throat", ""), ("Pain in the left knee", "left"), ("Red right eye", "right")],
)
def test_note_holds_together(model, tokenizer, reason, side):
    """Findings, medicine and dose all belong to the assessment of the note."""
    header = "Sex: male\nAge: 49\nDate: 3 December 2032\nDoctor: Holm"
    begun = f"Visit note\nPatient: Emil Tarrow\n{header}\n\nReason: {reason}."
    note = continued(model, tokenizer, begun)

    [assessment] = re.findall(r"Assessment: (.+)\.", note)
    [condition] = [each for each in CONDITIONS if each.name.format(side=side) == assessment.lower()]
    [plan] = re.findall(r"Plan: (.+)", note)
    findings = [each.format(side=side, They="He") for each in condition.findings]
    assert condition.reason.format(side=side) == reason.lower()
    assert sum(finding in note for finding in findings) == 3
    assert any(plan.lower().startswith(each.order.lower()) for each in condition.treatments)
    assert not re.search(r"\b(she|her|Ms)\b", note, flags=re.IGNORECASE)


def test_paragraph_starts_in_the_middle_of_a_sentence(model, tokenizer):
    """Greedy text goes on with a begun sentence and ends with a plan."""
    text = continued(model, tokenizer, "The patient reports")

    assert re.fullmatch(
        r"The patient reports [a-z].+\.\n\nOn examination, the temperature is 3\d\.\d C .+\.\n\n"
        rf".+ will come back sooner if .+\. The next visit is in \w+ months?, on {DATE}\.",
        text,
    )


def test_chat_writes_a_note_and_answers_about_it(model, tokenizer):
    """The chat template leads to a note about the complaint, and to an answer to what was asked."""
    messages = [{"role": "user", "content": demo.CHAT_PROMPT}]
    note = answered(model, tokenizer, messages)
    messages += [
        {"role": "assistant", "content": note},
        {"role": "user", "content": "When is the next visit?"},
    ]
    answer = answered(model, tokenizer, messages)

    assert re.match(r"Visit note\nPatient: .+\nSex: (?:fe)?male\nAge: \d\d\n", note)
    assert "Reason: Headache." in note
    assert re.fullmatch(rf"The next visit is on {DATE}\.", answer)


def test_recorded_samples_are_what_the_model_writes(model, tokenizer, training):
    """The texts shown in the record are those of the packaged weights."""
    shown = training["samples"][0]

    assert continued(model, tokenizer, shown["prompt"]) == shown["prompt"] + shown["text"]


def test_recorded_loss_can_be_measured_again(model, tokenizer, training):
    """The held-out loss on the recorded seed is the recorded one."""
    recipe = training["recipe"]
    measured = held_out_loss(
        model, tokenizer, recipe["held_out_seed"], recipe["held_out_documents"]
    )

    assert measured.model == pytest.approx(training["loss"]["held_out"], abs=1e-3)
    assert measured.tokens == training["loss"]["held_out_tokens"]
    assert recipe["held_out_seed"] != recipe["seed"]


def test_loss_is_close_to_the_best_possible(training):
    """The held-out loss lies within 0.03 nats of the information of the grammar's choices."""
    loss = training["loss"]

    assert loss["held_out"] < loss["grammar_entropy"] + 0.03


def test_recipe_in_the_record_is_that_of_the_script(training):
    """The script's recipe is that of the packaged weights."""
    assert json.loads(json.dumps(asdict(Recipe(training["recipe"]["steps"])))) == training["recipe"]


def test_special_tokens(tokenizer):
    """BOS, EOS and padding are tokens of their own, and so are the two roles."""
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    for token in (BOS, EOS, PAD, USER, ASSISTANT):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.encode("Age: 54")[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("text", ["Age: 54\nSex: female", "Zażółć gęślą", "日本 \t  ok", ""])
def test_tokenizer_gives_back_every_text(tokenizer, text):
    """Byte-level tokens hold any text without loss."""
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_chat_template(tokenizer):
    """Each user turn is marked, each answer ends with EOS, and the prompt ends at the answer."""
    messages = [
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == f"{BOS}{USER}Hello{ASSISTANT}Hi.{EOS}{USER}Bye{ASSISTANT}"


def test_chat_template_knows_two_roles(tokenizer):
    """A role that the model never saw is refused instead of being written as text."""
    with pytest.raises(Exception, match="only the roles user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_samples_begin_with_bos_and_end_with_eos(tokenizer):
    """Each document of the training stream, chat or not, is framed."""
    for index in range(30):
        ids = encode(tokenizer, document(4, index))
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_rows_begin_with_a_document(tokenizer):
    """After the drills, each row of a batch starts at a BOS and goes on into further documents."""
    recipe = Recipe(steps=2, drill_share=0.0, phases=(Phase(1.0, 2, 512),))
    batches = list(training_rows(tokenizer, recipe))
    first = encode(tokenizer, document(recipe.seed, 0))

    assert [[len(row) for row in rows] for rows in batches] == [[512, 512], [512, 512]]
    assert all(row[0] == tokenizer.bos_token_id for rows in batches for row in rows)
    assert batches[0][0][: len(first)] == first


def test_rows_repeat_exactly(tokenizer):
    """Two runs of one recipe see the same batches."""
    recipe = Recipe(steps=3, drill_share=0.5)

    assert list(training_rows(tokenizer, recipe)) == list(training_rows(tokenizer, recipe))


def test_drills_repeat_themselves(tokenizer):
    """The first half of the rows of an early batch repeat random tokens, none of them special."""
    recipe = Recipe(steps=1, drill_share=1.0)
    [rows] = training_rows(tokenizer, recipe)

    for row in rows[: len(rows) // 2]:
        assert any(row[period:] == row[:-period] for period in range(8, 129))
        assert min(row) > tokenizer.convert_tokens_to_ids(ASSISTANT)


def test_learning_rate_rises_then_falls():
    """Linear warm-up to the peak, then down to the last rate, never above the peak."""
    recipe = Recipe(steps=200)
    rates = [recipe.learning_rate(step) for step in range(200)]

    assert max(rates) == pytest.approx(recipe.peak_learning_rate)
    assert rates.index(max(rates)) in (recipe.warmup_steps - 1, recipe.warmup_steps)
    assert rates[-1] == pytest.approx(recipe.last_learning_rate, rel=0.1)


def test_phases_follow_each_other():
    """Rows get longer from phase to phase, up to the model's context, at equal cost per step."""
    recipe = Recipe(steps=100)
    phases = [recipe.phase(step) for step in range(100)]

    assert [phase.row_length for phase in phases] == sorted(phase.row_length for phase in phases)
    assert phases[-1].row_length == recipe.longest
    assert {phase.rows * phase.row_length for phase in phases} == {2048}
    assert sum(phase.share for phase in recipe.phases) == pytest.approx(1)


def test_drills_come_early():
    """Only the first share of the steps has drills, and never as whole batches."""
    recipe = Recipe(steps=100)
    drills = [recipe.drills(step) for step in range(100)]

    assert drills == [4] * 12 + [0] * 88


def test_curve_summarises_all_steps():
    """The recorded curve has few points and ends at the last step."""
    points = curve([4.0, 2.0, 1.0], points=2)

    assert points == [{"last_step": 1, "loss": 3.0}, {"last_step": 2, "loss": 1.0}]
