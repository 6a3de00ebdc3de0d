"""Policy files: what they say, and that a policy that accepts anything cannot be written."""

from __future__ import annotations

import pytest
from tests.signing_service import AUDIENCE, IMAGE, IMAGE_CLAIM, ISSUER, SigningService

from fedsea.errors import ConfigError
from fedsea.privacy.token_policy import TokenPolicy, load_policy

SERVICE = SigningService()


def test_a_short_policy(tmp_path):
    """What is left out has the defaults; the key file is found beside the policy."""
    policy, keys = load_policy(SERVICE.write_policy(tmp_path))
    assert policy == TokenPolicy(
        issuer=ISSUER,
        audience=AUDIENCE,
        algorithms=("ES256",),
        measurements={IMAGE_CLAIM: (IMAGE,)},
    )
    assert keys == tmp_path / "keys.json"


def test_a_policy_with_everything(tmp_path):
    """Every key takes effect."""
    path = SERVICE.write_policy(
        tmp_path,
        audience=None,
        nonce_claim='"nonce"',
        binding='"nonce"',
        debug_claims='["a.debug", "dbgstat"]',
        max_age_s="60",
        clock_skew_s="2.5",
    )
    policy, _ = load_policy(path)
    assert (policy.audience, policy.nonce_claim, policy.key_claim) == (None, "nonce", None)
    assert policy.debug_claims == ("a.debug", "dbgstat")
    assert (policy.max_age_s, policy.clock_skew_s) == (60.0, 2.5)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("issuer", None, "issuer is missing; add it"),
        ("keys", None, "keys is missing; add it"),
        ("algorithms", None, "algorithms is missing"),
        ("measurements", None, "measurements is missing"),
        ("isuer", '"x"', "isuer is no key of an attestation policy; did you mean issuer"),
        ("issuer", "5", "issuer must be a text"),
        ("issuer", '""', "issuer is empty"),
        ("audience", '""', "audience is empty"),
        ("keys", "[]", "keys must be the path"),
        ("algorithms", "[]", "algorithms is empty"),
        ("algorithms", '"ES256"', "algorithms must be a list of texts"),
        ("algorithms", '["none"]', "algorithm 'none' is not accepted"),
        ("algorithms", '["ES256", "HS256"]', "algorithm 'HS256' is not accepted"),
        ("measurements", "{}", "measurements is empty"),
        ("measurements", '["x"]', r"must be a table of claims: \[measurements\]"),
        ("measurements", '{ "image" = [] }', "'image' needs at least one accepted value"),
        ("measurements", '{ "image" = [""] }', "none of them empty"),
        ("measurements", '{ "image" = "x" }', "'image' must be a list of texts"),
        ("measurements", '{ a.image = ["x"] }', "put a name with dots into quotes"),
        ("nonce_claim", '""', "nonce_claim is empty"),
        ("key_claim", '""', "key_claim is empty"),
        ("debug_claims", "[]", "debug_claims is empty"),
        ("debug_claims", '[""]', "debug_claims is empty"),
        ("max_age_s", "0", "max_age_s must be a positive number"),
        ("max_age_s", "inf", "max_age_s must be a positive number"),
        ("max_age_s", "nan", "max_age_s must be a positive number"),
        ("max_age_s", "true", "max_age_s must be a number of seconds"),
        ("clock_skew_s", "-1", "from 0 to 300"),
        ("clock_skew_s", "301", "from 0 to 300"),
        ("clock_skew_s", '"1"', "clock_skew_s must be a number of seconds"),
        ("binding", '"none"', "binding must be 'key' or 'nonce'"),
        ("binding", "5", "binding must be 'key' or 'nonce'"),
    ],
)
def test_a_bad_policy(tmp_path, key, value, words):
    """Each is refused by name, with the file and the fix."""
    path = SERVICE.write_policy(tmp_path, **{key: value})
    with pytest.raises(ConfigError, match=words) as caught:
        load_policy(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_two_ways_to_bind_the_key(tmp_path):
    """A claim for the key beside a nonce that has it in it."""
    path = SERVICE.write_policy(tmp_path, binding='"nonce"', key_claim='"cnf"')
    with pytest.raises(ConfigError, match="remove one"):
        load_policy(path)


@pytest.mark.parametrize("content", [b"issuer =", b"\xff\xfe"])
def test_what_is_no_toml(tmp_path, content):
    """The file is named."""
    path = tmp_path / "policy.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"policy\.toml is not valid TOML"):
        load_policy(path)


def test_a_missing_policy(tmp_path):
    """The file is named."""
    with pytest.raises(ConfigError, match=r"policy\.toml does not exist"):
        load_policy(tmp_path / "policy.toml")
