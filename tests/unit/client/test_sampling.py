"""The sampler draws what `transformers` generate draws, and refuses bad parameters by name."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import LogitsProcessorList, TopPLogitsWarper

from fedsea.client.sampling import (
    FinishReason,
    Sampler,
    SamplingParams,
    derive_seed,
    sample_batch,
)
from fedsea.errors import ConfigError, ModelError

VOCAB = 96
EOS = 2


def _tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


MODEL = _tiny_model()


def _reference(prompt: list[int], params: SamplingParams) -> list[int]:
    """The new ids of `transformers` generate."""
    options = {
        "max_new_tokens": params.max_new_tokens,
        "min_new_tokens": params.min_new_tokens,
        "repetition_penalty": float(params.repetition_penalty),
        "eos_token_id": None if params.ignore_eos else EOS,
    }
    if params.temperature > 0:
        torch.manual_seed(params.seed)
        options |= {
            "do_sample": True,
            "temperature": float(params.temperature),
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
        }
    else:
        options["do_sample"] = False
    if params.ignore_eos:
        MODEL.generation_config.eos_token_id = None
    try:
        ids = MODEL.generate(torch.tensor([prompt]), **options)
    finally:
        MODEL.generation_config.eos_token_id = EOS
    return list(ids[0, len(prompt) :].tolist())


@torch.inference_mode()
def _ours(prompt: list[int], params: SamplingParams) -> list[int]:
    """The new ids when each step's logits of the same model go to a `Sampler`."""
    sampler = Sampler(params, prompt, [EOS])
    cache, ids = None, prompt
    while sampler.finish_reason is None:
        out = MODEL(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, [sampler.sample(out.logits[0, -1])]
    return list(sampler.generated)


prompts = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=8)
drawing = {
    "temperature": st.one_of(st.just(1.0), st.floats(0.3, 2.0)),
    "top_k": st.sampled_from([0, 1, 2, 5, 50, 1000]),
    "top_p": st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    "seed": st.integers(0, 2**63 - 1),
}
shared = {
    "repetition_penalty": st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    "max_new_tokens": st.just(8),
    "min_new_tokens": st.integers(0, 8),
    "ignore_eos": st.booleans(),
}


class TestParity:
    """The same ids as `transformers`, for the same logits and seed."""

    @settings(max_examples=60)
    @given(prompts, st.builds(SamplingParams, **drawing, **shared))
    def test_seeded_draws_equal_generate(self, prompt, params):
        """With torch seeded alike, generate(do_sample=True) and the sampler give the same ids."""
        assert _ours(prompt, params) == _reference(prompt, params)

    @settings(max_examples=30)
    @given(prompts, st.builds(SamplingParams, **shared))
    def test_greedy_equals_generate(self, prompt, params):
        """Temperature 0 gives the ids of generate(do_sample=False)."""
        assert _ours(prompt, params) == _reference(prompt, params)

    @settings(max_examples=40)
    @given(
        seed=st.integers(0, 2**32),
        top_p=st.floats(0.01, 0.9999),
        spread=st.floats(0.01, 8),
        levels=st.sampled_from([2, 20, 10**6]),
        vocab=st.sampled_from([1, 2, 33, 5000]),
    )
    def test_top_p_keeps_what_transformers_keeps(self, seed, top_p, spread, levels, vocab):
        """Draws after top-p are the same, with tied logits and without."""
        logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * spread
        logits = (logits * levels).round() / levels
        expected = LogitsProcessorList([TopPLogitsWarper(top_p)])(None, logits)
        generator = torch.Generator().manual_seed(seed)
        sampler = Sampler(SamplingParams(temperature=1.0, top_p=top_p, seed=seed), [], [])
        for _ in range(16):
            wanted = torch.multinomial(expected.softmax(-1), 1, generator=generator)
            assert sampler.sample(logits[0]) == int(wanted)

    def test_top_p_removes_a_tail_of_exactly_the_rest(self):
        """A tail whose probability is exactly 1 - top_p goes, as in transformers."""
        logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
        assert TopPLogitsWarper(0.5)(None, logits).isfinite().tolist() == [[True] + [False] * 3]
        sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.5, seed=0), [], [])
        assert {sampler.sample(logits[0]) for _ in range(50)} == {0}

    @pytest.mark.parametrize(
        ("logits", "expected"), [([-0.5, -0.6], 1), ([0.5, 0.4], 1), ([0.0, -0.1], 0)]
    )
    def test_penalty_lowers_logits_of_either_sign(self, logits, expected):
        """Negative logits are multiplied and positive ones divided, so both become less likely."""
        sampler = Sampler(SamplingParams(repetition_penalty=1.5), [0], [])
        assert sampler.sample(torch.tensor(logits)) == expected


class TestBatches:
    """Rows are chosen as if each were alone."""

    @settings(max_examples=40)
    @given(
        st.lists(
            st.tuples(
                prompts,
                st.one_of(
                    st.builds(SamplingParams, **shared),
                    st.builds(SamplingParams, **drawing, **shared),
                ),
            ),
            min_size=1,
            max_size=5,
        ),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    def test_batch_equals_single_rows(self, rows, dtype):
        """A mixed batch gives each row the ids that a sampler alone gives, and spares the logits."""
        together = [Sampler(params, prompt, [EOS]) for prompt, params in rows]
        alone = [Sampler(params, prompt, [EOS]) for prompt, params in rows]
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            logits = torch.randn(len(rows), VOCAB, generator=generator).to(dtype)
            before = logits.clone()
            expected = [sampler.sample(row) for sampler, row in zip(alone, logits, strict=True)]
            assert sample_batch(together, logits) == expected
            assert torch.equal(before, logits)
        assert [s.generated for s in together] == [s.generated for s in alone]

    def test_greedy_takes_the_first_of_equal_logits(self):
        """Ties go to the lowest id, as in torch.argmax."""
        logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
        samplers = [Sampler(SamplingParams(), [], []) for _ in range(2)]
        assert sample_batch(samplers, logits) == [1, 0]

    def test_empty_batch(self):
        """No rows give no ids."""
        assert sample_batch([], torch.empty(0, VOCAB)) == []

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu(self):
        """On a GPU a mixed batch equals single rows and greedy rows take the largest logit."""
        params = [
            SamplingParams(repetition_penalty=1.3),
            SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=5),
        ]
        logits = torch.randn(2, VOCAB, device="cuda")
        together = sample_batch([Sampler(p, [1, 5], [EOS], "cuda") for p in params], logits)
        alone = [
            Sampler(p, [1, 5], [EOS], "cuda").sample(row)
            for p, row in zip(params, logits, strict=True)
        ]
        assert together == alone


class TestSeeds:
    """Where random numbers start."""

    def test_first_sample_uses_the_seed_itself(self):
        """One sample and the first of n samples agree."""
        assert derive_seed(1234, 0) == 1234
        assert Sampler(SamplingParams(seed=1234), [], []).seed == 1234

    def test_derived_seeds_are_the_documented_ones(self):
        """The rule is part of the interface: stored seeds must give the same text for ever."""
        assert [derive_seed(1234, index) for index in (1, 2)] == [
            12_737_747_204_524_896_977,
            4_748_400_012_760_927_809,
        ]

    @given(st.integers(0, 2**64 - 1), st.integers(0, 1000))
    def test_every_derived_seed_is_usable(self, seed, index):
        """Any seed and index give a seed that parameters accept."""
        SamplingParams(seed=derive_seed(seed, index))

    def test_samples_of_a_request_differ(self):
        """Samples of one request are different draws, and the same draws next time."""
        params = SamplingParams(temperature=1.0, seed=3, n=3)
        logits = torch.zeros(10_000)
        draws = [Sampler(params, [], [], index=i).sample(logits) for i in range(3)]
        again = [Sampler(params, [], [], index=i).sample(logits) for i in range(3)]
        assert len(set(draws)) == 3
        assert draws == again

    def test_no_seed_means_a_fresh_one(self):
        """Without a seed two samplers start differently, and tell with what they started."""
        first, second = (Sampler(SamplingParams(temperature=1.0), [], []) for _ in range(2))
        assert first.seed != second.seed


class TestFinish:
    """When a sequence is over."""

    def test_reasons_have_stable_names(self):
        """The names are what the command line prints and a gateway returns."""
        assert [str(r) for r in FinishReason] == ["length", "eos", "stop_string", "cancelled"]

    def _run(self, params: SamplingParams, favourite: int) -> Sampler:
        sampler = Sampler(params, [5], [EOS])
        logits = torch.zeros(VOCAB)
        logits[favourite], logits[9] = 2.0, 1.0
        while sampler.finish_reason is None:
            sampler.sample(logits)
        return sampler

    def test_length(self):
        """max_new_tokens tokens and no more."""
        sampler = self._run(SamplingParams(max_new_tokens=3), favourite=7)
        assert sampler.generated == [7, 7, 7]
        assert sampler.finish_reason is FinishReason.LENGTH

    def test_eos(self):
        """An end-of-text id ends the sequence and is its last id."""
        sampler = self._run(SamplingParams(max_new_tokens=3), favourite=EOS)
        assert sampler.generated == [EOS]
        assert sampler.finish_reason is FinishReason.EOS

    def test_eos_at_the_last_place_is_eos(self):
        """A text that ends by itself at the limit was not cut."""
        sampler = self._run(SamplingParams(max_new_tokens=1), favourite=EOS)
        assert sampler.finish_reason is FinishReason.EOS

    def test_ignore_eos(self):
        """With ignore_eos only the length ends the sequence."""
        sampler = self._run(SamplingParams(max_new_tokens=3, ignore_eos=True), favourite=EOS)
        assert sampler.generated == [EOS] * 3
        assert sampler.finish_reason is FinishReason.LENGTH

    def test_min_new_tokens(self):
        """End-of-text is not chosen before min_new_tokens."""
        sampler = self._run(SamplingParams(min_new_tokens=2), favourite=EOS)
        assert sampler.generated == [9, 9, EOS]


class TestIdsBeyondTheLogits:
    """A tokenizer may know ids that the model gives no logits for."""

    def test_are_passed_over(self):
        """Such ids in the prompt or among the end-of-text ids change nothing."""
        params = SamplingParams(repetition_penalty=2.0, min_new_tokens=1)
        sampler = Sampler(params, [VOCAB + 5, 1], [VOCAB + 1, EOS])
        logits = torch.zeros(VOCAB)
        logits[1], logits[EOS], logits[3] = 3.0, 9.0, 2.0
        assert sampler.sample(logits) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_are_an_error(temperature, bad):
    """An overflowed model is reported, not decoded, and the sampler stays as it was."""
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), [], [])
    logits = torch.zeros(VOCAB)
    logits[3] = bad
    with pytest.raises(ModelError, match="not finite"):
        sampler.sample(logits)
    assert sampler.generated == []


def test_masked_logits_are_allowed():
    """Minus infinity excludes an id and is no error."""
    logits = torch.full((VOCAB,), -math.inf)
    logits[4] = -3.0
    for temperature in (0.0, 1.0):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=1, top_p=0.5), [], [])
        assert sampler.sample(logits) == 4


class TestParams:
    """What parameters may be."""

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("max_new_tokens", 0, "at least 1"),
            ("max_new_tokens", 1.5, "an integer"),
            ("max_new_tokens", True, "an integer"),
            ("temperature", -0.1, "0 for greedy"),
            ("temperature", math.nan, "0 for greedy"),
            ("temperature", math.inf, "0 for greedy"),
            ("temperature", 1e-9, "at least 0.0001"),
            ("temperature", "hot", "0 for greedy"),
            ("temperature", False, "0 for greedy"),
            ("top_k", -1, "at least 0"),
            ("top_k", 2.0, "an integer"),
            ("top_p", 0.0, "above 0 and up to 1"),
            ("top_p", 1.1, "above 0 and up to 1"),
            ("top_p", None, "above 0 and up to 1"),
            ("min_p", -0.1, "from 0 to 1"),
            ("min_p", 1.5, "from 0 to 1"),
            ("repetition_penalty", 0.0, "from 0.01 to 100"),
            ("repetition_penalty", math.nan, "from 0.01 to 100"),
            ("seed", -1, "None or an integer"),
            ("seed", 2**64, "None or an integer"),
            ("seed", 1.0, "None or an integer"),
            ("n", 0, "at least 1"),
            ("ignore_eos", 1, "true or false"),
            ("ignore_eos", "yes", "true or false"),
            ("min_new_tokens", -1, "from 0 to max_new_tokens"),
            ("min_new_tokens", 129, "from 0 to max_new_tokens"),
        ],
    )
    def test_bad_value(self, name, value, allowed):
        """A bad value is refused with its key, the value and what is allowed."""
        with pytest.raises(ConfigError, match=allowed) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value).startswith(f"{name} = {value!r}: it must be ")

    @pytest.mark.parametrize(
        ("stop", "message"),
        [
            ("secret", "stop is a str"),
            (["secret"], "stop is a list"),
            (("secret", ""), r"stop\[1\] = ''"),
            (("secret", 3), r"stop\[1\] = 3"),
        ],
    )
    def test_bad_stop(self, stop, message):
        """A bad stop is refused by its place; the text of the others is not shown."""
        with pytest.raises(ConfigError, match=message) as caught:
            SamplingParams(stop=stop)
        assert "secret" not in str(caught.value)

    def test_every_number_has_a_rule(self):
        """No parameter escapes the checks."""
        for field in dataclasses.fields(SamplingParams):
            with pytest.raises(ConfigError, match=f"^{field.name}"):
                SamplingParams.from_mapping({field.name: object()})

    def test_long_values_are_shortened(self):
        """A message stays one readable line whatever was passed."""
        with pytest.raises(ConfigError) as caught:
            SamplingParams.from_mapping({"temperature": "x" * 10_000})
        assert len(str(caught.value)) < 200

    def test_frozen(self):
        """Parameters can be shared between requests."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            SamplingParams().top_k = 3  # type: ignore[misc]


class TestFromMapping:
    """Parameters from a configuration table."""

    def test_values_arrive(self):
        """Every known key is used; the rest keep their defaults."""
        made = SamplingParams.from_mapping({"temperature": 0.5, "top_k": 4, "stop": ["a", "b"]})
        assert made == SamplingParams(temperature=0.5, top_k=4, stop=("a", "b"))

    def test_one_stop_string(self):
        """One stop string needs no list."""
        assert SamplingParams.from_mapping({"stop": "end"}).stop == ("end",)

    def test_empty(self):
        """An empty table gives the defaults."""
        assert SamplingParams.from_mapping({}) == SamplingParams()

    def test_misspelt_key(self):
        """An unknown key is refused with the nearest known one."""
        with pytest.raises(ConfigError, match="'temprature': did you mean 'temperature'"):
            SamplingParams.from_mapping({"temprature": 1})

    def test_every_unknown_key_is_named(self):
        """Several unknown keys are all named, and what is known is listed where nothing is near."""
        with pytest.raises(ConfigError) as caught:
            SamplingParams.from_mapping({"topk": 1, "zzz": 2, "": 3})
        message = str(caught.value)
        assert "'topk': did you mean 'top_k'?" in message
        assert "'zzz': known are max_new_tokens, temperature" in message
        assert "'': known are" in message

    def test_bad_value(self):
        """Values are checked as in the constructor."""
        with pytest.raises(ConfigError, match=r"top_p = 2: it must be"):
            SamplingParams.from_mapping({"top_p": 2})
