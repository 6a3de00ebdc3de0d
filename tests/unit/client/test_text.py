"""Streamed text equals the text decoded at once, and stop strings cut it at the right place."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedsea.client.text import IncrementalDecoder, StopStrings, decode

SHARED_ASSETS = Path(__file__).parents[4] / "shared" / "assets"
REPLACEMENT = "\ufffd"

CORPUS = [
    "The visit of Mrs. Ågren on 3 May: no findings, she isn't worried.",
    "Die Größe beträgt 7 µm; naïve café, coöperation, 東京は夜の七時, привет, 👩‍⚕️🙂.",
]


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges: most characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|user|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with byte fallback and a stripped first space, in the manner of Llama 2."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "a", "b", "▁a", "▁the", "é", REPLACEMENT, "<0x", "\n", ""]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken("<unk>"), AddedToken("</s>")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


BYTE_LEVEL = _byte_level_tokenizer()
BYTE_FALLBACK = _byte_fallback_tokenizer()


def _stream(tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens)
    return [*map(decoder.push, ids), decoder.flush()]


def _check_equal(data: st.DataObject, tokenizer) -> None:
    """Draw ids of every kind and compare the stream with decoding at once."""
    # Runs of special ids, of single bytes and of ids beyond the vocabulary are where it is hard.
    size = len(tokenizer)
    some = st.one_of(st.integers(0, size + 3), st.integers(0, min(size - 1, 270)))
    written = st.text(max_size=20).map(
        lambda text: tokenizer.encode(text, add_special_tokens=False)
    )
    parts = data.draw(st.lists(st.one_of(written, st.lists(some, max_size=50)), max_size=8))
    ids = [token for part in parts for token in part]
    skip = data.draw(st.booleans())
    whole = decode(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(_stream(tokenizer, ids, skip_special_tokens=skip)) == whole


class TestEqualsDecode:
    """The joined pieces are the text of all ids."""

    @pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
    @settings(max_examples=300)
    @given(data=st.data())
    def test_built_tokenizers(self, tokenizer, data):
        """Any ids, broken characters, special and unknown ids included, stream to the same text."""
        _check_equal(data, tokenizer)

    @pytest.mark.shared
    @pytest.mark.parametrize(
        "folder", ["models/stories260K", "models/tinystories656K", "tokenizers/llama2"]
    )
    def test_shared_tokenizers(self, folder):
        """The same with the tokenizers of real checkpoints."""
        path = SHARED_ASSETS / folder
        if not path.is_dir():
            pytest.skip(f"the shared assets are absent: ../shared/assets/{folder}")
        tokenizer = AutoTokenizer.from_pretrained(path)

        @settings(max_examples=150)
        @given(data=st.data())
        def check(data):
            _check_equal(data, tokenizer)

        check()

    def test_ids_of_text_give_the_text(self):
        """What was encoded comes back, character for character."""
        for text in CORPUS:
            ids = BYTE_LEVEL.encode(text)
            assert "".join(_stream(BYTE_LEVEL, ids)) == text


class TestPieces:
    """What each piece may hold."""

    def test_no_piece_breaks_a_character(self):
        """Valid text streams without a single replacement character."""
        for text in CORPUS:
            pieces = _stream(BYTE_LEVEL, BYTE_LEVEL.encode(text))
            assert not any(REPLACEMENT in piece for piece in pieces)

    def test_certain_text_is_given_at_once(self):
        """A plain token's text leaves with its own push, not later."""
        ids = BYTE_LEVEL.encode("no findings")
        assert _stream(BYTE_LEVEL, ids)[:-1] == [
            decode(BYTE_LEVEL, ids[: i + 1])[len(decode(BYTE_LEVEL, ids[:i])) :]
            for i in range(len(ids))
        ]
        assert _stream(BYTE_LEVEL, ids)[-1] == ""

    def test_only_an_unfinished_character_is_held(self):
        """Invalid bytes are given out as soon as the next token shows that they are invalid."""
        invalid, letter = BYTE_LEVEL.convert_tokens_to_ids(["ÿ", "a"])
        pieces = _stream(BYTE_LEVEL, [letter, invalid, invalid, letter])
        assert pieces == ["a", "", REPLACEMENT, REPLACEMENT + "a", ""]

    def test_byte_fallback_run_waits_for_its_end(self):
        """A run of byte tokens is valid or invalid as a whole, so it is given as a whole."""
        ids = BYTE_FALLBACK.convert_tokens_to_ids(["a", "<0xC3>", "<0xA9>", "<0xC3>", "b"])
        assert _stream(BYTE_FALLBACK, ids) == ["a", "", "", "", REPLACEMENT * 3 + "b", ""]
        assert _stream(BYTE_FALLBACK, ids[:3]) == ["a", "", "", "é"]

    def test_space_after_a_skipped_special_id_is_kept(self):
        """A special id in mid-text does not make the next word the first of the text."""
        ids = BYTE_FALLBACK.convert_tokens_to_ids(["▁the", "</s>", "▁the"])
        assert _stream(BYTE_FALLBACK, ids) == ["the", "", " the", ""]

    def test_space_after_many_empty_tokens_is_kept(self):
        """Tokens without text, however many, do not make the next word the first of the text."""
        ids = BYTE_FALLBACK.convert_tokens_to_ids(["▁the", *[""] * 40, "▁the"])
        assert "".join(_stream(BYTE_FALLBACK, ids)) == "the the"

    def test_special_ids_are_shown_on_request(self):
        """With skip_special_tokens=False special ids are text."""
        ids = BYTE_FALLBACK.convert_tokens_to_ids(["a", "</s>"])
        assert _stream(BYTE_FALLBACK, ids, skip_special_tokens=False) == ["a", "</s>", ""]

    def test_flush_starts_anew(self):
        """After flush the decoder serves the next sequence."""
        decoder = IncrementalDecoder(BYTE_FALLBACK)
        first, second = BYTE_FALLBACK.convert_tokens_to_ids(["▁the", "▁a"])
        assert [decoder.push(first), decoder.flush(), decoder.push(second)] == ["the", "", "a"]


class _CountingTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("token", ["a", "ÿ"])
def test_cost_per_token_does_not_grow(token):
    """Ten times the ids cost ten times the decoding, also when no byte is ever valid."""
    token_id = BYTE_LEVEL.convert_tokens_to_ids(token)
    counts = []
    for length in (200, 2000):
        counting = _CountingTokenizer(BYTE_LEVEL)
        _stream(counting, [token_id] * length)
        counts.append(counting.decoded)
    assert counts[1] <= 11 * counts[0]


def test_cost_of_a_byte_run_does_not_grow():
    """A long run of byte tokens is decoded once, at its end."""
    counting = _CountingTokenizer(BYTE_FALLBACK)
    _stream(counting, [BYTE_FALLBACK.convert_tokens_to_ids("<0x41>")] * 1000)
    assert counting.decoded <= 1000


def _cut(text: str, stops: list[str]) -> str:
    found = [text.find(stop) for stop in stops]
    return text[: min((at for at in found if at >= 0), default=len(text))]


# Few letters make stop strings, their beginnings and overlaps frequent.
texts = st.text("ab-", max_size=30)
stop_lists = st.lists(st.text("ab-", min_size=1, max_size=5), max_size=4)


class TestStopStrings:
    """The text ends before the earliest stop string."""

    @settings(max_examples=500)
    @given(stop_lists, st.lists(st.text("ab-", max_size=6), max_size=10))
    def test_streamed_equals_cut(self, stops, chunks):
        """For any text in any pieces, the stream is the whole text cut at the earliest stop."""
        stream = StopStrings(stops)
        pieces = [*map(stream.push, chunks), stream.flush()]
        whole = "".join(chunks)
        assert "".join(pieces) == _cut(whole, stops)
        assert stream.stopped == any(stop in whole for stop in stops)

    @given(stop_lists, texts)
    def test_what_was_given_never_depends_on_the_future(self, stops, text):
        """After each character the text given out is a beginning of every possible result."""
        stream = StopStrings(stops)
        given_out = ""
        for at, character in enumerate(text):
            given_out += stream.push(character)
            for future in ("", "a", "b", "-", "ab-ab-"):
                assert _cut(text[: at + 1] + future, stops).startswith(given_out)

    def test_without_stops_nothing_is_held(self):
        """No stop strings: every piece passes through."""
        stream = StopStrings([])
        assert [stream.push("abc"), stream.push("d"), stream.flush()] == ["abc", "d", ""]
        assert not stream.stopped

    def test_a_stop_across_pieces(self):
        """A stop string in three pieces is found, and the text before it is not lost."""
        stream = StopStrings(["\nUser:"])
        assert [stream.push(p) for p in ("Yes.\n", "Us", "er: and")] == ["Yes.", "", ""]
        assert stream.stopped
        assert [stream.push("more"), stream.flush()] == ["", ""]

    def test_a_false_beginning_is_given_back(self):
        """Text held for a stop string that does not come is released in full."""
        stream = StopStrings(["\nUser:"])
        assert [stream.push("\nUs"), stream.push("ual"), stream.flush()] == ["", "\nUsual", ""]

    def test_a_beginning_at_the_end_is_flushed(self):
        """The end of the text releases what was held."""
        stream = StopStrings(["END"])
        assert [stream.push("the EN"), stream.flush()] == ["the ", "EN"]
        assert not stream.stopped

    def test_the_earlier_stop_wins_though_it_ends_later(self):
        """A longer stop string that begins earlier cuts there; when it fails, the inner one cuts."""
        for last, expected in (("c", ""), ("x", "a")):
            stream = StopStrings(["abc", "b"])
            assert [stream.push("ab"), stream.stopped] == ["", False]
            assert stream.push(last) == expected
            assert stream.stopped

    def test_an_undecided_stop_is_settled_by_flush(self):
        """At the end of the text the inner stop string cuts, since the longer one did not come."""
        stream = StopStrings(["abc", "b"])
        assert [stream.push("ab"), stream.flush()] == ["", "a"]
        assert stream.stopped
