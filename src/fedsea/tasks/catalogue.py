"""The tasks by name: what reads their files, how they are put, how they are judged and trained.

Cloze and chat templates marked as the paper's are those of FedSEA-LLaMA, Tables 5 and 6 and its
code; so are the learning rates and LoRA sizes of CoQA, XSum, MultiRC and ReCoRD (Table 8). The
others are ours. The paper's code puts the passage of ReCoRD into its evaluation prompt twice; here
training and evaluation have one template.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedsea.errors import ConfigError
from fedsea.tasks import conversations, glue, metrics, overlap, summaries, superglue
from fedsea.tasks.task import Defaults, Task
from fedsea.tasks.templates import Template

_TRUTHS = ("true", "false")
_YES_NO = {"true": "yes", "false": "no"}
_LLAMA_2 = "[INST] <<SYS>>You are a helpful assistant.{system}<</SYS>>{user}[/INST]"


def _chat(system: str, user: str, words: Mapping[str, str] | None = None) -> Template:
    """A template in the paper's chat form. The beginning-of-text token is the tokenizer's to add."""
    prompt = _LLAMA_2.replace("{system}", system).replace("{user}", user)
    return Template(prompt=prompt, completion="{answer}", words=words or {})


def _conversation(system: str, user: str) -> Template:
    chat = _chat(system, user)
    return Template(
        prompt=chat.prompt,
        completion=chat.completion,
        turn="My question was {question:.}Your answer was {answer:.}",
    )


_CONVERSATION_PLAIN = Template(
    prompt="{story}\n\n{history}Question: {question:?}\nAnswer:",
    turn="Question: {question:?}\nAnswer: {answer}\n",
    stop="\n",
)
_SUMMARY_PLAIN = Template(prompt="{document}\n\nSummary:", stop="\n")
_HYPOTHESIS = '"{hypothesis:bare}"?'
_SUMMARIZE = "You need to summarize an abstract base on the provided passage."
_CONVERSE = "You need to answer my question base on the provided story."
_ASKED = "The story is {story:.}{history}My question is {question:.}"

TASKS: Mapping[str, Task] = {
    each.name: each
    for each in (
        Task(
            name="multirc",
            files="SuperGLUE JSON lines",
            read=superglue.read_multirc,
            fields=("passage", "question", "candidate"),
            labels=_TRUTHS,
            styles={
                "cloze": Template(
                    "{passage:.} Question: {question:?} Is it {candidate:bare}?",
                    " {answer}.",
                    _YES_NO,
                ),
                "chat": _chat(
                    "You need to judge whether the question is Yes or No base on the provided "
                    "passage.",
                    'The passage is "{passage}".Question:"{question}". '
                    'The possible answer is "{candidate}". Is it correct?',
                    {"true": "Yes", "false": "No"},
                ),
            },
            metric=metrics.multirc,
            scores=("f1a", "f1m", "em0", "em1"),
            defaults=Defaults(1024, 5, 1e-5, 32, 32, of_the_paper=True),
        ),
        Task(
            name="boolq",
            files="SuperGLUE JSON lines",
            read=superglue.read_boolq,
            fields=("passage", "question"),
            labels=_TRUTHS,
            styles={
                "cloze": Template(
                    "{passage:.} Question: {question:?} Answer:", " {answer}.", _YES_NO
                )
            },
            metric=metrics.accuracy,
            scores=("accuracy",),
            defaults=Defaults(512, 5),
        ),
        Task(
            name="rte",
            files="SuperGLUE JSON lines, GLUE table",
            read=superglue.read_rte,
            fields=("premise", "hypothesis"),
            labels=tuple(glue.ENTAILMENTS),
            styles={
                "cloze": Template(
                    _HYPOTHESIS,
                    ' {answer} "{premise}"',
                    {"entailment": "yes", "not_entailment": "no"},
                ),
                "question": Template(
                    "{premise} Question: {hypothesis:.} True or false? Answer:",
                    " {answer}.",
                    {"entailment": "true", "not_entailment": "false"},
                ),
            },
            metric=metrics.accuracy,
            scores=("accuracy",),
            defaults=Defaults(384, 5),
        ),
        Task(
            name="cb",
            files="SuperGLUE JSON lines",
            read=superglue.read_cb,
            fields=("premise", "hypothesis"),
            labels=superglue.COMMITMENTS,
            styles={
                "cloze": Template(
                    _HYPOTHESIS,
                    ' {answer} "{premise}"',
                    {"entailment": "yes", "contradiction": "no", "neutral": "maybe"},
                ),
                "question": Template(
                    "{premise} Question: {hypothesis:.} True, false or neither? Answer:",
                    " {answer}.",
                    {"entailment": "true", "contradiction": "false", "neutral": "neither"},
                ),
            },
            metric=metrics.accuracy_and_macro_f1,
            scores=("accuracy", "macro_f1"),
            defaults=Defaults(384, 5),
        ),
        Task(
            name="copa",
            files="SuperGLUE JSON lines",
            read=superglue.read_copa,
            fields=("premise", "choice1", "choice2", "link"),
            labels=("0", "1"),
            styles={
                "cloze": Template(
                    '"{choice1:inline}" or "{choice2:inline}"? {premise:bare}, {link}',
                    " {answer}.",
                    {"0": "{choice1:inline}", "1": "{choice2:inline}"},
                )
            },
            metric=metrics.accuracy,
            scores=("accuracy",),
            defaults=Defaults(128, 24),
        ),
        Task(
            name="wic",
            files="SuperGLUE JSON lines",
            read=superglue.read_wic,
            fields=("word", "sentence1", "sentence2"),
            labels=_TRUTHS,
            styles={
                "cloze": Template(
                    '"{sentence1}"/"{sentence2}" Similar sense of {word}?', " {answer}.", _YES_NO
                )
            },
            metric=metrics.accuracy,
            scores=("accuracy",),
            defaults=Defaults(128, 5),
        ),
        Task(
            name="wsc",
            files="SuperGLUE JSON lines",
            read=superglue.read_wsc,
            fields=("text", "marked", "pronoun", "noun"),
            labels=_TRUTHS,
            styles={
                "cloze": Template(
                    "{marked:.} The pronoun '*{pronoun}*' refers to",
                    " {answer}.",
                    {"true": "{noun}"},
                    stop=".",
                ),
                "question": Template(
                    "{marked:.} Question: does '*{pronoun}*' refer to {noun}? Answer:",
                    " {answer}.",
                    _YES_NO,
                ),
            },
            metric=metrics.accuracy,
            scores=("accuracy",),
            defaults=Defaults(256, 16),
        ),
        Task(
            name="record",
            files="SuperGLUE JSON lines",
            read=superglue.read_record,
            fields=("passage", "query", "before", "after"),
            labels=(),
            styles={
                "cloze": Template("{passage:.} {before}", "{answer}{after}"),
                "chat": _chat(
                    "You need to predict what @placeholder represents in the query based on the "
                    "provided passage.",
                    'The passage is "{passage}".The query is "{query}".'
                    "What does @placeholder represent?",
                ),
            },
            metric=metrics.best_span,
            scores=("f1", "em"),
            defaults=Defaults(920, 20, 2e-5, 32, 32, of_the_paper=True),
        ),
        Task(
            name="coqa",
            files="CoQA JSON",
            read=conversations.read_coqa,
            fields=("story", "question"),
            labels=(),
            styles={"chat": _conversation(_CONVERSE, _ASKED), "plain": _CONVERSATION_PLAIN},
            metric=metrics.conversation,
            scores=("f1", "em", "em_any"),
            defaults=Defaults(1024, 20, 1e-4, 4, 32, of_the_paper=True),
        ),
        Task(
            name="quac",
            files="QuAC JSON, JSON lines of passage, question and answer",
            read=conversations.read_quac,
            fields=("story", "question"),
            labels=(),
            styles={"chat": _conversation(_CONVERSE, _ASKED), "plain": _CONVERSATION_PLAIN},
            metric=metrics.conversation,
            scores=("f1", "em", "em_any"),
            defaults=Defaults(1024, 64, 1e-4, 4, 32),
        ),
        Task(
            name="xsum",
            files="JSON lines of document and summary",
            read=summaries.read_xsum,
            fields=("document",),
            labels=(),
            styles={
                "chat": _chat(_SUMMARIZE, "The passage is {document:.}"),
                "plain": _SUMMARY_PLAIN,
            },
            metric=overlap.summary,
            scores=overlap.ROUGE,
            defaults=Defaults(1024, 64, 3e-5, 16, 32, of_the_paper=True),
        ),
        Task(
            name="cnn_dailymail",
            files="JSON lines of article and highlights",
            read=summaries.read_cnn_dailymail,
            fields=("document",),
            labels=(),
            styles={
                "chat": _chat(_SUMMARIZE, "The passage is {document:.}"),
                "plain": _SUMMARY_PLAIN,
            },
            metric=overlap.summary,
            scores=overlap.ROUGE,
            defaults=Defaults(1536, 128, 3e-5, 16, 32),
        ),
        Task(
            name="sst2",
            files="GLUE table",
            read=glue.read_sst2,
            fields=("sentence",),
            labels=glue.SENTIMENTS,
            styles={
                "cloze": Template(
                    "{sentence} It was",
                    " {answer}.",
                    {"negative": "terrible", "positive": "great"},
                )
            },
            metric=metrics.accuracy,
            scores=("accuracy",),
            defaults=Defaults(128, 5),
        ),
    )
}


def task(name: str) -> Task:
    """The task of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; use {', '.join(TASKS)}")
    return TASKS[name]
