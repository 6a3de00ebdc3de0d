from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path

import pytest
from tests.signing_service import SigningService

from fedsea.cli import options
from fedsea.cli.options import (
    ClientDType,
    ConnectionOptions,
    DType,
    Quantization,
    RowCodec,
    SamplingOptions,
)
from fedsea.client.llm import LLM
from fedsea.client.sampling import SamplingParams
from fedsea.errors import ConfigError
from fedsea.privacy.attestation import TokenVerifier
from fedsea.server.config import DTYPES, QUANTIZATIONS, ServerSection
from fedsea.transport.certificates import init_ca, issue_client
from fedsea.transport.credentials import ClientTLS, Plaintext
from fedsea.wire.codecs import VALUE_CODECS


def test_choices_are_those_of_the_library():
    """Choices are written down here only so that help needs no torch: they must not drift."""
    assert {codec.value for codec in RowCodec} == {codec.value for codec in VALUE_CODECS} | {"auto"}
    assert {dtype.value for dtype in DType} == set(DTYPES)
    assert {dtype.value for dtype in ClientDType} == set(DTYPES) | {"auto"}
    assert {kind.value for kind in Quantization} == set(QUANTIZATIONS)
    assert ServerSection(model="m").address == options.DEFAULT_ADDRESS


def test_sampling_options_are_the_parameters_with_their_defaults():
    """Every sampling parameter has an option, and an option that is not given changes nothing."""
    names = {entry.name for entry in fields(SamplingOptions)} | {"n"}

    assert names == {entry.name for entry in fields(SamplingParams)}
    assert SamplingOptions().params() == SamplingParams()


def test_sampling_options_are_checked_by_the_library():
    """A value out of range is refused with the library's own words."""
    with pytest.raises(ConfigError, match="top_p"):
        SamplingOptions(top_p=2.0).params()


def test_client_defaults_are_those_of_connect():
    """The options of a client mean the same as leaving out the arguments."""
    parameters = inspect.signature(LLM.connect).parameters
    group = options.ClientModelOptions()

    assert (group.bottom, group.top) == parameters["partition"].default
    for name in ("dtype", "codec", "quantization", "device"):
        assert getattr(group, name) == parameters[name].default


def test_certificates_from_a_folder(certs):
    """`--certs` is enough when the folder holds one client."""
    tls = ConnectionOptions(certs=certs).credentials()

    assert tls == ClientTLS(certs / "ca.pem", certs / "client-acme.pem", certs / "client-acme.key")


def test_single_files_come_before_the_folder(certs, tmp_path):
    """One file may lie elsewhere."""
    tls = ConnectionOptions(certs=certs, ca=tmp_path / "other.pem").credentials()

    assert isinstance(tls, ClientTLS)
    assert (tls.ca, tls.key) == (tmp_path / "other.pem", certs / "client-acme.key")


def test_several_clients_need_a_name(tmp_path):
    """A folder with several clients asks which one, and `--tenant` answers."""
    init_ca(tmp_path)
    issue_client(tmp_path, "acme")
    issue_client(tmp_path, "zeta")
    with pytest.raises(ConfigError, match="acme, zeta: choose one with --tenant"):
        ConnectionOptions(certs=tmp_path).credentials()

    tls = ConnectionOptions(certs=tmp_path, tenant="zeta").credentials()
    assert isinstance(tls, ClientTLS)
    assert tls.certificate.name == "client-zeta.pem"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (ConnectionOptions(), "--certs DIR"),
        (ConnectionOptions(ca=Path("a"), cert=Path("b")), "--ca, --cert and --key"),
        (ConnectionOptions(certs=Path("nowhere")), "holds no client certificate"),
        (ConnectionOptions(plaintext=True, key=Path("a")), "--plaintext is given beside"),
        (ConnectionOptions(plaintext=True, token_file=Path("nope")), "does not exist"),
    ],
)
def test_impossible_identities_are_refused(given, words):
    """Whatever is missing or contradicts itself is named."""
    with pytest.raises(ConfigError, match=words):
        given.credentials()


def test_token_comes_out_of_its_file(tmp_path, certs):
    """The token is the file's text without the line end; an empty file is refused."""
    file = tmp_path / "token"
    file.write_text("secret\n", encoding="utf-8")
    given = ConnectionOptions(certs=certs, token_file=file)

    assert given.credentials().token == "secret"
    assert ConnectionOptions(plaintext=True, token_file=file).credentials() == Plaintext(
        allow_insecure=True, token="secret"
    )
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is empty"):
        given.credentials()


def test_servers_have_a_default_and_an_order():
    """Without `--server` the client tries where a server listens by default."""
    given = ConnectionOptions(server=["b:1", "a:2"])

    assert given.addresses == ["b:1", "a:2"]
    assert replace(given, server=None).addresses == [options.DEFAULT_ADDRESS]


def test_environment_names_the_server(fedsea, monkeypatch, certs, tmp_path):
    """FEDSEA_SERVER and FEDSEA_CERTS stand for the options."""
    monkeypatch.setenv("FEDSEA_SERVER", "nowhere")
    monkeypatch.setenv("FEDSEA_CERTS", str(certs))
    result = fedsea("generate", tmp_path, "hi")

    assert result.exit_code == 2
    assert "'nowhere' is not an address" in result.stderr


def test_no_proof_is_demanded_unless_a_policy_is_given():
    """The mode attested is chosen, not a default."""
    assert ConnectionOptions().verifier() is None


def test_an_attestation_policy(tmp_path):
    """The file makes the verifier; a mistake in it is told before anything is loaded."""
    service = SigningService()
    policy = service.write_policy(tmp_path)
    verifier = ConnectionOptions(attestation_policy=policy).verifier()
    assert isinstance(verifier, TokenVerifier)
    assert verifier.policy.algorithms == (service.algorithm,)
    service.write_policy(tmp_path, isuer='"x"')
    with pytest.raises(ConfigError, match="isuer is no key"):
        ConnectionOptions(attestation_policy=policy).verifier()


def test_an_attestation_policy_without_tls(tmp_path):
    """There is no key to bind a proof to."""
    with pytest.raises(ConfigError, match="beside --plaintext"):
        ConnectionOptions(plaintext=True, attestation_policy=tmp_path / "p.toml").verifier()
