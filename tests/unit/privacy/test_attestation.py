"""The verifier of tokens: one good token, and one test for every way in which one can be bad."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.signing_service import AUDIENCE, IMAGE, IMAGE_CLAIM, ISSUER, SigningService, good_claims

from fedsea.errors import AttestationError, ConfigError
from fedsea.privacy.attestation import Evidence, TokenVerifier, joint_nonce
from fedsea.privacy.token_policy import TokenPolicy
from fedsea.privacy.trusted_keys import TrustedKey

NOW = 1_800_000_000.0
NONCE = bytes(range(32))
KEY = hashlib.sha256(b"the TLS key of the server").hexdigest()
SERVICE = SigningService()
POLICY = TokenPolicy(
    issuer=ISSUER,
    audience=AUDIENCE,
    algorithms=("ES256",),
    measurements={IMAGE_CLAIM: (IMAGE, "sha256:" + "00" * 32)},
)


def verifier(service=SERVICE, now=NOW, **changes) -> TokenVerifier:
    """A verifier that pins a service's key, at a fixed time."""
    policy = replace(POLICY, algorithms=(service.algorithm,), **changes)
    keys = [TrustedKey(service.key.public_key(), service.key_id, service.algorithm)]
    return TokenVerifier(policy, keys, clock=lambda: now)


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims with some replaced, or left out when None."""
    found = {**good_claims(NONCE, KEY, NOW), **changes}
    return {name: value for name, value in found.items() if value is not None}


def evidence(token: str) -> Evidence:
    """What a client holds when a server has shown this token."""
    return Evidence(token, NONCE, KEY, "trunk.test:50051")


def refusal(token: str, judge: TokenVerifier | None = None) -> str:
    """The message with which a token is refused; it quotes no part of it."""
    with pytest.raises(AttestationError) as caught:
        (judge or verifier()).verify(evidence(token))
    message = str(caught.value)
    assert message.endswith("; nothing was sent")
    assert not any(len(part) > 8 and part in message for part in token.split("."))
    assert NONCE.hex() not in message
    assert IMAGE not in message
    return message


def accepted(token: str, judge: TokenVerifier | None = None) -> bool:
    """Whether a token is accepted, for the key of the connection."""
    return (judge or verifier()).verify(evidence(token)).key_sha256 == KEY


def refused(**changes: Any) -> str:
    """The refusal of a well signed token whose claims are changed."""
    return refusal(SERVICE.sign(claims(**changes)))


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "ES384", "EdDSA"])
def test_a_good_token_is_accepted(algorithm):
    """With each algorithm; what was accepted says on whose word, what runs, and until when."""
    service = SigningService(algorithm)
    found = verifier(service).verify(evidence(service.sign(claims())))
    assert (found.issuer, found.key_sha256) == (ISSUER, KEY)
    assert found.measurements == ((IMAGE_CLAIM, IMAGE),)
    assert found.expires == NOW + POLICY.max_age_s
    assert found.describe() == (
        f"attested by {ISSUER}: {IMAGE_CLAIM} {IMAGE}; until 2027-01-15 08:05:00 UTC"
    )


def test_a_token_without_key_id_is_tried_with_every_key():
    """Where the service names no key, the pinned ones decide."""
    service = SigningService(key_id=None)
    other = SigningService(key_id="other")
    keys = [TrustedKey(other.key.public_key(), "other"), TrustedKey(service.key.public_key())]
    judge = TokenVerifier(POLICY, keys, clock=lambda: NOW)
    assert accepted(service.sign(claims()), judge)


@pytest.mark.parametrize(
    "token", ["", "a.b", "a.b.c", "{}", "e30.e30.e30.e30", "\N{SNOWMAN}.b.c", "[" * 9000 + ".b.c"]
)
def test_what_is_no_token(token):
    """Rubbish is refused at its form."""
    with pytest.raises(AttestationError, match="at its form"):
        verifier().verify(evidence(token))


@given(st.text(max_size=60))
def test_any_text_is_refused(text):
    """Whatever a server sends in place of a token: our error, no other."""
    with pytest.raises(AttestationError):
        verifier().verify(evidence(text))


def test_a_header_that_nests_without_end():
    """A header made to exhaust the parser is refused at its form."""
    header = base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=")
    assert "at its form" in refusal(f"{header}.e30.c2ln")


@pytest.mark.parametrize("payload", [b"[]", b"nothing", b'{"iss": "a", "iss": "b"}', b"\xff"])
def test_claims_of_no_use(payload):
    """Signed, but not one JSON object with each claim once."""
    assert "at its form" in refusal(SERVICE.sign(payload))


def test_unknown_critical_extensions():
    """A token that asks for what this side does not know is refused."""
    assert "at its form" in refusal(SERVICE.sign(claims(), crit=["exp"]))


def test_an_unsigned_token():
    """`alg: none` is never accepted."""
    token = jwt.encode(claims(), "", "none")
    assert "at its algorithm" in refusal(token)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_shared_secret(algorithm):
    """The public key taken as a shared secret (the classic confusion) signs nothing here."""
    header = {"alg": algorithm, "typ": "JWT", "kid": SERVICE.key_id}
    parts = [json.dumps(part).encode() for part in (header, claims())]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    mac = jwt.get_algorithm_by_name(algorithm)
    signature = mac.sign(signed, hashlib.sha512(SERVICE.public_pem()).digest())
    token = b".".join((signed, base64.urlsafe_b64encode(signature).rstrip(b"="))).decode()
    assert "at its algorithm" in refusal(token)


def test_an_algorithm_that_the_policy_does_not_list():
    """A pinned kind of key is not enough: the policy lists the algorithms."""
    assert "at its algorithm" in refusal(SigningService("EdDSA").sign(claims()))


def test_a_key_id_that_is_not_pinned():
    """The service names a key that nobody pinned."""
    assert "at its signing key" in refusal(SERVICE.sign(claims(), kid="key-2"))


def test_a_key_that_the_token_brings_along():
    """A stranger signs, names the pinned key, and sends its own key in the header: not used."""
    stranger = SigningService()
    token = stranger.sign(claims(), jwk=stranger.jwk(), jku="https://stranger.test/keys")
    assert "at its signature" in refusal(token)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_changed_token(part):
    """One character elsewhere in any part, and the token is refused before its claims count."""
    parts = SERVICE.sign(claims()).split(".")
    middle = len(parts[part]) // 2
    swapped = "A" if parts[part][middle] != "A" else "B"
    parts[part] = parts[part][:middle] + swapped + parts[part][middle + 1 :]
    with pytest.raises(AttestationError, match=r"at its (form|algorithm|signing key|signature)"):
        verifier().verify(evidence(".".join(parts)))


@pytest.mark.parametrize("issuer", ["https://other.test", ISSUER + "/", "", None, [ISSUER], 7])
def test_another_issuer(issuer):
    """The issuer is compared whole."""
    assert "at its issuer" in refused(iss=issuer)


@pytest.mark.parametrize("audience", ["other", ["other", "third"], "", None, {AUDIENCE: 1}])
def test_another_audience(audience):
    """A token made for somebody else is refused; so is one for nobody."""
    assert "at its audience" in refused(aud=audience)


def test_one_audience_among_several():
    """The list form of `aud` counts when ours is in it."""
    assert accepted(SERVICE.sign(claims(aud=["other", AUDIENCE])))


def test_a_policy_without_audience():
    """Services that write none are fine; a token that has one was meant for somebody."""
    judge = verifier(audience=None)
    assert accepted(SERVICE.sign(claims(aud=None)), judge)
    assert "at its audience" in refusal(SERVICE.sign(claims()), judge)


@pytest.mark.parametrize("name", ["iat", "exp", "nbf"])
@pytest.mark.parametrize("value", ["1800000000", True, -1, 2**60, [], float("nan"), float("inf")])
def test_a_time_that_is_none(name, value):
    """Times are finite numbers of seconds."""
    assert "at its time" in refused(**{name: value})


@pytest.mark.parametrize("name", ["iat", "exp"])
def test_a_missing_time(name):
    """A token says when it was issued and when it expires."""
    assert f"at its time: {name} is missing" in refused(**{name: None})


def test_a_token_without_not_before():
    """`nbf` may be left out."""
    assert accepted(SERVICE.sign(claims(nbf=None)))


SKEW = POLICY.clock_skew_s


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp": NOW - SKEW}, "has expired"),
        ({"nbf": NOW + SKEW + 1}, "not valid yet"),
        ({"iat": NOW + SKEW + 1, "nbf": NOW}, "issued in the future"),
        ({"iat": NOW - POLICY.max_age_s - SKEW - 1}, "too long ago"),
    ],
)
def test_the_wrong_time(changes, words):
    """Outside of its times, skew of clocks allowed for, a token is refused."""
    assert words in refused(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": NOW - SKEW + 1},
        {"nbf": NOW + SKEW},
        {"iat": NOW + SKEW, "nbf": NOW},
        {"iat": NOW - POLICY.max_age_s - SKEW},
    ],
)
def test_the_last_right_time(changes):
    """Within the skew it is accepted, and always for some time to come."""
    assert verifier().verify(evidence(SERVICE.sign(claims(**changes)))).expires > NOW


def test_acceptance_ends_with_the_token():
    """A token that lives shorter than the policy allows ends acceptance, skew allowed for."""
    found = verifier().verify(evidence(SERVICE.sign(claims(exp=NOW + 20))))
    assert found.expires == NOW + 20 + SKEW


@pytest.mark.parametrize(
    "nonce", ["", None, "00" * 32, NONCE.hex()[:-2], NONCE.hex() + "00", [], [["x"]], 5]
)
def test_another_nonce(nonce):
    """A token made for another request, an old one for example, is refused."""
    assert "at its nonce" in refused(eat_nonce=nonce)


def base64url(data: bytes) -> str:
    """As JOSE writes bytes."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.mark.parametrize(
    "nonce", [NONCE.hex().upper(), base64url(NONCE), base64url(NONCE) + "=", ["x", NONCE.hex()]]
)
def test_forms_of_a_nonce(nonce):
    """Hex or base64url, alone or in a list."""
    assert accepted(SERVICE.sign(claims(eat_nonce=nonce)))


@pytest.mark.parametrize("key", ["", None, "11" * 32, KEY[:-2], KEY + "00", [], 5])
def test_another_tls_key(key):
    """The token of another server, relayed by the one that we are connected to, is refused."""
    assert "at its TLS key" in refused(tls_key_sha256=key)


def test_nonce_and_key_in_one_list():
    """Services that sign a list of nonces can carry the key in it."""
    token = SERVICE.sign(claims(tls_key_sha256=None, eat_nonce=[NONCE.hex(), KEY]))
    assert accepted(token, verifier(key_claim="eat_nonce"))
    assert "at its TLS key" in refusal(
        SERVICE.sign(claims(eat_nonce=[NONCE.hex()])), verifier(key_claim="eat_nonce")
    )


def test_a_service_that_signs_a_nonce_only():
    """Nonce and key hashed together bind both; either alone is refused."""
    judge = verifier(key_claim=None)
    joint = joint_nonce(NONCE, KEY)
    assert joint == hashlib.sha256(NONCE + bytes.fromhex(KEY)).digest()
    assert accepted(SERVICE.sign(claims(eat_nonce=base64url(joint))), judge)
    for other in (NONCE, bytes.fromhex(KEY), joint_nonce(NONCE, "22" * 32)):
        assert "at its nonce" in refusal(SERVICE.sign(claims(eat_nonce=other.hex())), judge)


@pytest.mark.parametrize("state", ["enabled", "", None, True, 0, 1, "on", ["disabled"], {}])
def test_debugging_is_on_or_unknown(state):
    """Only the words for off are off; nothing said is not off."""
    assert "at its debug state" in refused(dbgstat=state)


@pytest.mark.parametrize(
    "state", [False, "false", "disabled", "disabled-permanently", "Disabled-Since-Boot"]
)
def test_debugging_is_off(state):
    """The words of RFC 9711, and a plain false."""
    assert accepted(SERVICE.sign(claims(dbgstat=state)))


@pytest.mark.parametrize(
    "more",
    [
        {"x-ms-sevsnpvm-is-debuggable": True},
        {"tdx": {"td_attributes": {"DEBUG": True}}},
        {"submodules": [{"gpu": {"dbgstat": "enabled"}}]},
        {"debug": 1},
    ],
)
def test_debugging_is_on_somewhere_else(more):
    """A claim about debugging that the policy does not name is listened to all the same."""
    assert "at its debug state" in refused(**more)


def test_other_claims_about_debugging_that_are_off():
    """They do no harm."""
    more = {"tdx": {"debug": False}, "gpus": [{"dbgstat": "disabled"}]}
    assert accepted(SERVICE.sign(claims(**more)))


@pytest.mark.parametrize(
    "submods",
    [
        {"container": {"image_digest": "sha256:" + "66" * 32}},
        {"container": {"image_digest": IMAGE + " "}},
        {"container": {"image_digest": [IMAGE]}},
        {"container": {}},
        {"container": IMAGE},
        None,
    ],
)
def test_another_image(submods):
    """What is not in the allow-list, or not where it belongs, is refused."""
    assert "at its measurement" in refused(submods=submods)


def test_every_measurement_counts():
    """All claims of the allow-list must fit, not one of them."""
    judge = verifier(measurements={IMAGE_CLAIM: (IMAGE,), "hwmodel": ("H100",)})
    assert "claim hwmodel" in refusal(SERVICE.sign(claims()), judge)
    found = judge.verify(evidence(SERVICE.sign(claims(hwmodel="H100"))))
    assert dict(found.measurements) == {IMAGE_CLAIM: IMAGE, "hwmodel": "H100"}


def test_a_claim_whose_name_has_dots():
    """A name is looked up whole before it is taken apart."""
    judge = verifier(measurements={"https://a.test/image": (IMAGE,)})
    token = SERVICE.sign(claims(**{"https://a.test/image": IMAGE}))
    assert accepted(token, judge)


def test_keys_that_cannot_sign_what_the_policy_lists():
    """A pinned key of another kind is found out before any server is asked."""
    keys = [TrustedKey(SigningService("EdDSA").key.public_key())]
    with pytest.raises(ConfigError, match="none of the pinned keys is for ES256"):
        TokenVerifier(POLICY, keys)


def test_evidence_shows_no_token():
    """The token is in no repr, from where it would get into logs."""
    token = SERVICE.sign(claims())
    assert token not in repr(evidence(token))


def test_from_file(tmp_path):
    """A policy file and the keys beside it make a verifier that runs by the real clock."""
    judge = TokenVerifier.from_file(SERVICE.write_policy(tmp_path))
    token = SERVICE.sign(good_claims(NONCE, KEY))
    assert judge.verify(evidence(token)).issuer == ISSUER
    assert judge.policy.measurements == {IMAGE_CLAIM: (IMAGE,)}
