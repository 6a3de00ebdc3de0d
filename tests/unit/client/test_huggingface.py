import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.tiny_models import VOCABULARY, save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)

from fedsea.client.huggingface import SplitForCausalLM
from fedsea.client.llm import LLM
from fedsea.client.split_cache import CachedRow, NewColumns
from fedsea.errors import Capacity, ConfigError, PromptTooLong, RequestError
from fedsea.server.config import ServerConfig
from fedsea.server.service import TrunkService
from fedsea.transport.memory import MemoryChannel

# One family with full attention, two with sliding windows and their own scaling of logits.
FAMILIES = ("llama", "gemma3_text", "olmo3")
PROMPT = [5, 17, 33, 8, 60, 21, 17, 33, 8, 60, 4]
UNEQUAL = (PROMPT, [9, 41, 3], [70, 71, 72, 5, 6, 90, 13])


class Split:
    """A split model over the memory transport, and the whole model that it must equal."""

    def __init__(self, folder, **options):
        table = {
            "server": {"model": str(folder)},
            "kv": {"rows": 8192},
            "security": {"plaintext": True},
        }
        self.service = TrunkService.load(ServerConfig.from_table(table))
        self.channels = []
        channels = {"memory": self.channel}
        self.llm = LLM.connect(folder, channels, **options)
        self.llm.background.run(self.service.__aenter__())
        self.model = SplitForCausalLM.from_llm(self.llm)
        self.whole = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        ).eval()

    def channel(self):
        self.channels.append(MemoryChannel(self.service))
        return self.channels[-1]

    def cut(self):
        """Break every connection."""
        for channel in self.channels:
            self.llm.background.run(channel.cut())

    def close(self):
        self.model.close()
        self.check_nothing_held()
        self.llm.background.run(self.service.__aexit__(None, None, None))
        self.llm.close()

    def check_nothing_held(self):
        for pool in self.llm.split.parts.pools:
            pool.check_integrity()
            assert pool.num_accounts == 0

    def both(self, input_ids, **options):
        """What `generate` gives, split and whole, under the same seed."""
        answers = []
        for model in (self.model, self.whole):
            torch.manual_seed(11)
            answers.append(model.generate(input_ids, **options))
        return answers

    def check_equal(self, input_ids, **options):
        split, whole = self.both(input_ids, **options)
        assert split.tolist() == whole.tolist()


def save(family, folder):
    """A tiny model with a tokenizer whose words are w0, w1, ..."""
    save_tiny(family, folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the tiny models by family."""
    return {family: save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request, folders):
    """A split model of every family of these tests."""
    split = Split(folders[request.param])
    yield split
    split.close()


@pytest.fixture
def split(folders):
    """A split Llama of the test's own; nothing may be held when its caches are gone."""
    split = Split(folders["llama"])
    yield split
    split.close()


def ids(*rows):
    """Rows of ids as a batch."""
    return torch.tensor(rows)


def padded(rows, side="left"):
    """Input ids and attention mask of unequal rows."""
    width = max(map(len, rows))
    blank = [[0] * (width - len(row)) for row in rows]
    if side == "left":
        table = [pad + list(row) for pad, row in zip(blank, rows, strict=True)]
        mask = [pad + [1] * len(row) for pad, row in zip(blank, rows, strict=True)]
    else:
        table = [list(row) + pad for pad, row in zip(blank, rows, strict=True)]
        mask = [[1] * len(row) + pad for pad, row in zip(blank, rows, strict=True)]
    return ids(*table), ids(*mask)


def close_to(split, whole):
    """Equal within the tolerance of parity."""
    torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)


class TestParity:
    def test_logits(self, any_family):
        """Logits of all columns, of the last ones and of chosen ones equal the whole model's."""
        x = ids(PROMPT, PROMPT[::-1])
        whole = any_family.whole(x).logits
        close_to(any_family.model(x).logits, whole)
        close_to(any_family.model(x, logits_to_keep=2).logits, whole[:, -2:])
        picked = any_family.model(x, logits_to_keep=torch.tensor([3, 7])).logits
        close_to(picked, whole[:, [3, 7]])

    def test_greedy(self, any_family):
        """Greedy ids equal, with a cache and without one."""
        any_family.check_equal(ids(PROMPT), max_new_tokens=24, do_sample=False)
        any_family.check_equal(ids(PROMPT), max_new_tokens=6, do_sample=False, use_cache=False)

    def test_sampling(self, any_family):
        """Under one seed the sampled ids equal, also of several samples of each row."""
        options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
        any_family.check_equal(ids(PROMPT), max_new_tokens=24, **options)
        any_family.check_equal(
            ids(PROMPT, PROMPT[::-1]), max_new_tokens=12, num_return_sequences=3, **options
        )

    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 4},
            {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.4},
            {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
            {"num_beams": 4, "do_sample": True},
        ],
    )
    def test_beams(self, any_family, options):
        """Beams and their scores equal, for a batch of unequal prompts too."""
        x, mask = padded(UNEQUAL)
        split, whole = any_family.both(
            x,
            attention_mask=mask,
            max_new_tokens=14,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        assert split.sequences.tolist() == whole.sequences.tolist()
        close_to(split.sequences_scores, whole.sequences_scores)

    def test_left_padded_batch(self, any_family):
        """A batch of unequal prompts gives the whole model's batch, and each row alone."""
        x, mask = padded(UNEQUAL)
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
        batch, whole = any_family.both(x, attention_mask=mask, **options)
        assert batch.tolist() == whole.tolist()
        for row, prompt in zip(batch, UNEQUAL, strict=True):
            alone = any_family.model.generate(ids(prompt), **options)
            assert row[-16:].tolist() == alone[0, -16:].tolist()

    def test_right_padded_scoring(self, any_family):
        """Logits of right-padded rows equal at every token, and are zero at padding."""
        x, mask = padded(UNEQUAL, side="right")
        logits = any_family.model(x, attention_mask=mask).logits
        whole = any_family.whole(x, attention_mask=mask).logits
        close_to(logits[mask == 1], whole[mask == 1])
        assert not logits[mask == 0].any()

    def test_prompt_lookup(self, any_family):
        """Drafts that are rejected leave nothing behind in the cache."""
        repetitive = ids(PROMPT * 3)
        any_family.check_equal(
            repetitive, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4
        )

    def test_assistant_model(self, any_family):
        """A local model may draft for the split one."""
        any_family.check_equal(
            ids(PROMPT), max_new_tokens=20, do_sample=False, assistant_model=any_family.whole
        )

    def test_processors(self, any_family):
        """Logits processors and stopping rules of transformers apply as they are."""
        any_family.check_equal(
            ids(PROMPT),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=1.4,
            no_repeat_ngram_size=3,
            bad_words_ids=[[7], [8, 9]],
            min_new_tokens=10,
        )

    def test_loss(self, any_family):
        """The loss is computed here and equals the whole model's; no cache is kept for it."""
        x = ids(PROMPT, PROMPT[::-1])
        labels = x.clone()
        labels[:, :3] = -100
        split = any_family.model(x, labels=labels)
        close_to(split.loss, any_family.whole(x, labels=labels).loss)
        assert split.past_key_values is None

    @pytest.mark.parametrize("partition", [(0, 0), (0, 2), (3, 0)])
    def test_partitions(self, folders, partition):
        """Bottom and top may be without blocks; padded scoring and beams equal all the same."""
        split = Split(folders["llama"], partition=partition)
        x, mask = padded(UNEQUAL)
        logits = split.model(x, attention_mask=mask, logits_to_keep=3).logits
        close_to(logits, split.whole(x, attention_mask=mask, logits_to_keep=3).logits)
        split.check_equal(x, attention_mask=mask, max_new_tokens=8, num_beams=3)
        split.close()

    def test_long_rows(self, split):
        """Long rows of a batch, each in a message of its own, give the same logits."""
        x = torch.randint(3, VOCABULARY, (2, 240), generator=torch.manual_seed(0))
        close_to(split.model(x).logits, split.whole(x).logits)

    def test_batch_larger_than_this_process_holds(self, folders):
        """Scoring takes as many rows at a time as fit, and keeps no cache then."""
        split = Split(folders["llama"], kv_rows=64)
        x = torch.randint(3, VOCABULARY, (5, 20), generator=torch.manual_seed(0))
        output = split.model(x)
        close_to(output.logits, split.whole(x).logits)
        assert output.past_key_values is None
        with pytest.raises(Capacity):
            split.model(x, use_cache=True)
        split.close()

    def test_lm_eval(self, split):
        """The `hf` model of lm-eval scores and generates over the split as over the whole model."""
        reason = "lm-eval is not installed; it comes with the extra `evaluation`"
        hf = pytest.importorskip("lm_eval.models.huggingface", reason=reason)
        instance = pytest.importorskip("lm_eval.api.instance").Instance
        pairs = [("w5 w17", " w33 w8"), ("w9", " w41 w3 w4"), ("w70 w71 w72", " w6")]
        until = {"until": ["w44"], "max_gen_toks": 12, "do_sample": False}
        answers = []
        for model in (split.model, split.whole):
            evaluator = hf.HFLM(model, tokenizer=split.llm.tokenizer, batch_size=2, max_length=64)
            scores = evaluator.loglikelihood(
                [instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True
            )
            texts = evaluator.generate_until(
                [instance("generate_until", {}, (text, until), 0) for text, _ in pairs],
                disable_tqdm=True,
            )
            answers.append((torch.tensor(scores), texts))
        close_to(answers[0][0], answers[1][0])
        assert answers[0][1] == answers[1][1]


class TestCache:
    def test_loop_of_forward_calls(self, any_family):
        """The cache that a call returns continues the next one, several columns at a time."""
        x = ids(PROMPT, PROMPT[::-1])
        whole = any_family.whole(x).logits
        cache, pieces = None, []
        for piece in x.split([4, 1, 3, 3], dim=1):
            output = any_family.model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
            assert cache.get_seq_length() == sum(p.shape[1] for p in pieces)
        close_to(torch.cat(pieces, dim=1), whole)

    @pytest.mark.parametrize("make", [lambda model: model.make_cache(), lambda _: DynamicCache()])
    def test_continues_across_generate(self, any_family, make):
        """A second turn sends only what is new, with a cache of ours or an empty DynamicCache."""
        cache = make(any_family.model)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        first = any_family.model.generate(ids(PROMPT), past_key_values=cache, **options)
        sent = cache.layers[0].traffic.rows_up
        assert sent == len(PROMPT) + 7
        second = torch.cat([first, ids([40, 41, 42])], dim=1)
        answer = any_family.model.generate(second, past_key_values=cache, **options)
        assert cache.layers[0].traffic.rows_up == second.shape[1] + 7
        assert answer.tolist() == any_family.whole.generate(second, **options).tolist()

    def test_returned_by_generate(self, any_family):
        """The cache of a finished call, given back with the text, continues it."""
        options = {"do_sample": False, "eos_token_id": None}
        first = any_family.model.generate(
            ids(PROMPT), max_new_tokens=5, return_dict_in_generate=True, **options
        )
        answer = any_family.model.generate(
            first.sequences, past_key_values=first.past_key_values, max_new_tokens=9, **options
        )
        whole = any_family.whole.generate(ids(PROMPT), max_new_tokens=14, **options)
        assert answer.tolist() == whole.tolist()

    def test_beams_from_a_cache(self, any_family):
        """A cache that is repeated for beams goes on in a session that has room for all of them."""
        options = {"max_new_tokens": 7, "num_beams": 3}
        answers = []
        for model, cache in (
            (any_family.model, any_family.model.make_cache()),
            (any_family.whole, DynamicCache()),
        ):
            model(ids(PROMPT), past_key_values=cache)
            cache.batch_repeat_interleave(3)
            x = ids([*PROMPT, 50])
            answers.append(model.generate(x, past_key_values=cache, **options))
        assert answers[0].tolist() == answers[1].tolist()

    def test_grows(self, split):
        """A cache that outgrows its session opens a larger one and goes on."""
        cache = split.model.make_cache(max_length=4)
        x = ids(PROMPT)
        split.model(x[:, :4], past_key_values=cache)
        logits = split.model(x[:, 4:], past_key_values=cache).logits
        close_to(logits, split.whole(x).logits[:, 4:])

    def test_crop_and_reorder(self, any_family):
        """Cropped, reordered, repeated and selected rows continue as the whole model's do."""
        caches = any_family.model.make_cache(), DynamicCache()
        fed = ids(PROMPT, PROMPT[::-1], PROMPT[3:] + PROMPT[:3])
        logits = []
        for model, cache in zip((any_family.model, any_family.whole), caches, strict=True):
            model(fed, past_key_values=cache)
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([2, 2, 0]))
            model(ids([50, 51], [52, 53], [54, 55]), past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3, 5]))
            assert cache.get_seq_length() == 10
            logits.append(model(ids([7], [8], [9]), past_key_values=cache).logits)
        close_to(*logits)

    def test_cut_connection(self, any_family):
        """A connection that breaks between two calls costs no token."""
        cache = any_family.model.make_cache()
        options = {"do_sample": False, "eos_token_id": None}
        first = any_family.model.generate(
            ids(PROMPT), past_key_values=cache, max_new_tokens=4, **options
        )
        any_family.cut()
        answer = any_family.model.generate(
            first, past_key_values=cache, max_new_tokens=6, **options
        )
        whole = any_family.whole.generate(first, max_new_tokens=6, **options)
        assert answer.tolist() == whole.tolist()

    def test_threads(self, split):
        """Calls of several threads have sessions of their own."""
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda row: split.model.generate(ids(row), **options), UNEQUAL * 2)
        for answer, row in zip(answers, UNEQUAL * 2, strict=True):
            assert answer.tolist() == split.whole.generate(ids(row), **options).tolist()

    def test_deep_copy(self, any_family):
        """A copy continues on its own; the original is as before."""
        cache = any_family.model.make_cache()
        any_family.model(ids(PROMPT), past_key_values=cache)
        twin = copy.deepcopy(cache)
        other = any_family.model(ids([30]), past_key_values=twin).logits
        same = any_family.model(ids([31]), past_key_values=cache).logits
        close_to(other, any_family.whole(ids([*PROMPT, 30])).logits[:, -1:])
        close_to(same, any_family.whole(ids([*PROMPT, 31])).logits[:, -1:])

    def test_reset(self, split):
        """A cache that was reset takes another batch."""
        cache = split.model.make_cache()
        split.model(ids(PROMPT), past_key_values=cache)
        cache.reset()
        x = ids(PROMPT[:4], PROMPT[4:8])
        close_to(split.model(x, past_key_values=cache).logits, split.whole(x).logits)

    def test_session_ends_with_the_cache(self, split):
        """A dropped output frees its rows here and at the server; nothing waits for a collector."""
        gc.disable()
        try:
            output = split.model(ids(PROMPT))
            layer = weakref.ref(output.past_key_values.layers[0])
            assert split.llm.split.parts.bottom.pool.num_accounts == 1
            del output
            assert layer() is None
            split.model.generate(ids(PROMPT), max_new_tokens=4, num_beams=2)
            split.model(ids(PROMPT), use_cache=False)
        finally:
            gc.enable()
        split.model._sessions.close()
        split.check_nothing_held()

    def test_close_frees_living_caches(self, split):
        """After `close` nothing is held for a cache that somebody still has."""
        output = split.model(ids(PROMPT))
        split.model.close()
        split.check_nothing_held()
        with pytest.raises(RequestError, match="closed"):
            split.model(ids([3]), past_key_values=output.past_key_values)


class TestWire:
    """Only rows of real tokens are sent, and each of them once."""

    def traffic(self, split, *inputs, **options):
        cache = split.model.make_cache()
        split.model.generate(*inputs, past_key_values=cache, **options)
        return cache.traffic

    def test_padding_stays_here(self, split):
        """A padded batch sends its tokens and no padding."""
        x, mask = padded(UNEQUAL)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        traffic = self.traffic(split, x, attention_mask=mask, **options)
        assert traffic.rows_up == sum(map(len, UNEQUAL)) + 5 * len(UNEQUAL)

    def test_beams_send_the_prompt_once(self, split):
        """Beams share the prompt's rows, and later send one row each at most."""
        options = {"max_new_tokens": 6, "num_beams": 4, "eos_token_id": None}
        traffic = self.traffic(split, ids(PROMPT), **options)
        assert traffic.rows_up <= len(PROMPT) + 5 * 4
        assert traffic.rows_up < 4 * len(PROMPT)

    def test_rows_that_only_move_cost_nothing(self, split):
        """A permutation of beams sends no message of its own."""
        cache = split.model.make_cache()
        split.model(ids(PROMPT, PROMPT[::-1]), past_key_values=cache)
        before = cache.traffic.messages_up
        cache.reorder_cache(torch.tensor([1, 0]))
        split.model(ids([7], [8]), past_key_values=cache)
        assert cache.traffic.messages_up == before + 1

    def test_scoring_of_padding_only(self, split):
        """A row without any token sends nothing and gives zeros."""
        x, mask = padded([PROMPT, []])
        logits = split.model(x, attention_mask=mask).logits
        assert not logits[1].any()
        close_to(logits[:1], split.whole(ids(PROMPT)).logits)


class TestFace:
    """What code written for transformers asks of a model."""

    def test_attributes(self, split):
        """Config, generation config, device and dtype are those of the checkpoint."""
        model = split.model
        assert model.config.num_hidden_layers == split.whole.config.num_hidden_layers
        assert model.generation_config.eos_token_id == split.whole.generation_config.eos_token_id
        assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
        assert next(model.parameters()).device == model.device
        assert 0 < model.num_parameters() < split.whole.num_parameters()
        assert model.can_generate()
        model.tie_weights()
        assert model.to("cpu") is model.eval()

    def test_no_gradient(self, split):
        """A call outside no_grad gives plain tensors that may be changed in place."""
        logits = split.model(ids(PROMPT)).logits
        assert not logits.requires_grad
        logits[:, 0] = 0.0

    def test_tuple(self, split):
        """`return_dict=False` gives a tuple."""
        x = ids(PROMPT)
        outputs = split.model(x, use_cache=False, return_dict=False)
        assert len(outputs) == 1
        close_to(outputs[0], split.whole(x).logits)

    def test_pipeline(self, split):
        """The text-generation pipeline runs over the split, in batches too."""
        texts = [" ".join(f"w{n}" for n in row) for row in UNEQUAL]
        options = {"max_new_tokens": 9, "do_sample": False, "batch_size": 3}
        answers = []
        for model in (split.model, split.whole):
            generator = pipeline("text-generation", model=model, tokenizer=split.llm.tokenizer)
            answers.append(generator(texts, **options))
        assert answers[0] == answers[1]

    def test_connect_owns_its_connection(self, folders):
        """A model made by `connect` closes what it opened, and closes once."""
        server = Split(folders["llama"])
        with SplitForCausalLM.connect(
            folders["llama"], {"memory": lambda: MemoryChannel(server.service)}
        ) as model:
            assert model.config.model_type == "llama"
            model.close()
        with pytest.raises(RequestError, match="connect again"):
            model.generate(ids(PROMPT), max_new_tokens=2)
        server.close()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"inputs_embeds": torch.zeros(1, 2, 48)}, "inputs_embeds"),
            ({"output_hidden_states": True}, "output_hidden_states"),
            ({"output_attentions": True}, "output_attentions"),
            ({"head_mask": torch.ones(5)}, "head_mask"),
            ({"input_ids": None}, "input_ids"),
            ({"input_ids": ids([])}, "input_ids"),
            ({"input_ids": ids([4, VOCABULARY])}, "vocabulary"),
            ({"input_ids": ids([4, -1])}, "vocabulary"),
            ({"attention_mask": ids([1, 0, 1])}, "between tokens"),
            ({"attention_mask": ids([1, 1])}, r"needs \(1, 3\)"),
            ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"needs \(1, 3\)"),
            ({"position_ids": ids([1, 2, 3])}, "position_ids"),
            ({"position_ids": ids([0, 1])}, "position_ids"),
            ({"past_key_values": StaticCache}, "past_key_values"),
        ],
    )
    def test_what_cannot_be_represented(self, split, options, reason):
        """Each is refused with one line that names it, and the model stays usable."""
        options = {"input_ids": ids([4, 5, 6]), **options}
        if options.get("past_key_values") is StaticCache:
            options["past_key_values"] = StaticCache(split.whole.config, max_cache_len=8)
        with pytest.raises(RequestError, match=reason):
            split.model(**options)
        x = ids(PROMPT)
        close_to(split.model(x, use_cache=False).logits, split.whole(x).logits)

    def test_filled_cache_of_another_model(self, split):
        """Keys and values of the whole model are of no use to the split one."""
        cache = split.whole(ids(PROMPT)).past_key_values
        with pytest.raises(RequestError, match="past_key_values"):
            split.model(ids([3]), past_key_values=cache)

    def test_our_cache_in_another_model(self, split):
        """The whole model gets a clear error from a cache that holds no keys."""
        cache = split.model(ids(PROMPT)).past_key_values
        with pytest.raises(RequestError, match="split model"):
            split.whole(ids([3]), past_key_values=cache)

    def test_padding_that_the_mask_forgets(self, split):
        """A cache with padding needs the mask, whole and unchanged, on every call."""
        x, mask = padded(UNEQUAL)
        cache = split.model.make_cache()
        split.model(x, attention_mask=mask, past_key_values=cache)
        more = ids([3], [4], [5])
        with pytest.raises(RequestError, match="give the mask"):
            split.model(more, past_key_values=cache)
        ones = torch.ones(3, x.shape[1] + 1)
        with pytest.raises(RequestError, match="hides tokens"):
            split.model(more, attention_mask=ones, past_key_values=cache)
        with pytest.raises(RequestError, match="3 rows"):
            split.model(ids([3]), past_key_values=cache)

    def test_tokens_after_right_padding(self, split):
        """A right-padded batch can be scored and not continued."""
        x, mask = padded(UNEQUAL, side="right")
        cache = split.model.make_cache()
        split.model(x, attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        with pytest.raises(RequestError, match="between tokens"):
            split.model(ids([3], [4], [5]), attention_mask=mask, past_key_values=cache)

    def test_training(self, split):
        """A model in training mode says that it has no gradient, instead of giving none."""
        split.model.train()
        with pytest.raises(RequestError, match="no gradient"):
            split.model(ids(PROMPT), labels=ids(PROMPT))
        with torch.no_grad():
            split.model(ids(PROMPT), labels=ids(PROMPT))

    def test_moving(self, split):
        """Parts cannot be moved or converted away from their KV cache, nor saved."""
        for move in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")):
            with pytest.raises(ConfigError, match="stays at"):
                move(split.model)
        with pytest.raises(ConfigError, match="cannot be saved"):
            split.model.save_pretrained("anywhere")

    def test_static_cache(self, split):
        """Another implementation of the cache is refused by name."""
        with pytest.raises(RequestError, match="'static'"):
            split.model.generate(ids(PROMPT), max_new_tokens=2, cache_implementation="static")

    def test_context(self, split):
        """A prompt beyond the context is refused before anything is sent; the cache stays whole."""
        cache = split.model.make_cache()
        x = ids(PROMPT)
        split.model(x, past_key_values=cache)
        with pytest.raises(PromptTooLong, match="256"):
            split.model(torch.full((1, 250), 5), past_key_values=cache)
        logits = split.model(ids([9]), past_key_values=cache).logits
        close_to(logits, split.whole(ids([*PROMPT, 9])).logits[:, -1:])


class TestCachedRow:
    def test_crop_takes_columns_from_the_right(self):
        """Padding on the right goes first, then tokens, then padding on the left."""
        row = CachedRow([5, 6, 7], left=2, right=1, chain=0, released=3)
        row.crop(2)
        assert (row.left, row.ids, row.right, row.released) == (2, [5, 6], 0, 2)
        row.crop(3)
        assert (row.left, row.ids, row.right, row.released) == (1, [], 0, 0)

    def test_columns_add_up(self):
        """Padding columns before the first token lie to the left of it, later ones to the right."""
        row = CachedRow()
        for new in (NewColumns(3, (), 0), NewColumns(1, (5, 6), 0), NewColumns(2, (), 0)):
            assert row.fits(new)
            row.add(new)
        assert (row.left, row.ids, row.right) == (4, [5, 6], 2)
        assert not row.fits(NewColumns(0, (7,), 0))
