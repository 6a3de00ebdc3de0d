"""Run a large language model of which only the outer blocks are on your own machine.

The names below are the public interface; each is loaded when it is first used, so that importing
`fedsea` is quick.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from fedsea.client.examples import Example
    from fedsea.client.generation import Completion, Sample
    from fedsea.client.huggingface import SplitForCausalLM
    from fedsea.client.link import Patience
    from fedsea.client.llm import LLM
    from fedsea.client.protection import Protection
    from fedsea.client.sampling import FinishReason, SamplingParams
    from fedsea.client.sessions import Chat, Session
    from fedsea.client.trainer import Trainer
    from fedsea.client.training import SplitForTraining
    from fedsea.client.training_config import TrainerConfig
    from fedsea.client.training_protection import TrainingProtection
    from fedsea.errors import FedseaError
    from fedsea.model.lora import LoraConfig
    from fedsea.model.partition import Partition
    from fedsea.privacy.accounts import Budget
    from fedsea.privacy.attestation import TokenVerifier
    from fedsea.privacy.placeholders.config import Placeholders
    from fedsea.transport.credentials import ClientTLS, Plaintext

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Budget",
    "Chat",
    "ClientTLS",
    "Completion",
    "Example",
    "FedseaError",
    "FinishReason",
    "LoraConfig",
    "Partition",
    "Patience",
    "Placeholders",
    "Plaintext",
    "Protection",
    "Sample",
    "SamplingParams",
    "Session",
    "SplitForCausalLM",
    "SplitForTraining",
    "TokenVerifier",
    "Trainer",
    "TrainerConfig",
    "TrainingProtection",
    "__version__",
]

_HOMES = {
    "LLM": "fedsea.client.llm",
    "Budget": "fedsea.privacy.accounts",
    "Chat": "fedsea.client.sessions",
    "ClientTLS": "fedsea.transport.credentials",
    "Completion": "fedsea.client.generation",
    "Example": "fedsea.client.examples",
    "FedseaError": "fedsea.errors",
    "FinishReason": "fedsea.client.sampling",
    "LoraConfig": "fedsea.model.lora",
    "Partition": "fedsea.model.partition",
    "Patience": "fedsea.client.link",
    "Placeholders": "fedsea.privacy.placeholders.config",
    "Plaintext": "fedsea.transport.credentials",
    "Protection": "fedsea.client.protection",
    "Sample": "fedsea.client.generation",
    "SamplingParams": "fedsea.client.sampling",
    "Session": "fedsea.client.sessions",
    "SplitForCausalLM": "fedsea.client.huggingface",
    "SplitForTraining": "fedsea.client.training",
    "TokenVerifier": "fedsea.privacy.attestation",
    "Trainer": "fedsea.client.trainer",
    "TrainerConfig": "fedsea.client.training_config",
    "TrainingProtection": "fedsea.client.training_protection",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsea' has no attribute {name!r}")
    member = getattr(_importlib.import_module(_HOMES[name]), name)
    globals()[name] = member
    return member


def __dir__() -> list[str]:
    return sorted(__all__)
