"""Secure aggregation: Flower's SecAgg+ with masks of full strength, and what a client insists on.

The aggregator learns the weighted sum of the updates and no update (SecAgg+: Bell et al., CCS
2020). It is assumed to follow the protocol: it passes on the clients' public keys, which nobody
signs.

Two things are changed here, both at both ends.

* *Masks.* Flower folds the 32 bytes of a mask's seed into 32 bits, of an agreed key into 28, and
  expands them with a Mersenne Twister: whoever tries all seeds takes a mask off. Here all bytes of
  the seed are the key of ChaCha20 (`expand`).
* *Numbers in clear.* A client's number of examples and its metrics are removed from its reply. The
  number is in the masked vector already, where the weighted mean needs it.

A client refuses a protocol that protects it less than its own settings say (`check`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from flwr.app import ConfigRecord, Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsea.errors import ConfigError, PermissionDenied
from fedsea.federated.config import SecureSection

MODULUS: Final = 1 << 32
LEVELS: Final = 1 << 22

_TRAIN: Final = "train"
_EXPANDS: Final = (
    "flwr.client.mod.secure_aggregation.secaggplus_mod",
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow",
)
_NAME: Final = "pseudo_rand_gen"

Masks = list[NDArray[np.int64]]


def expand(seed: bytes, num_range: int, dimensions_list: Sequence[tuple[int, ...]]) -> Masks:
    """A mask for each shape: uniform numbers below 2^32 from ChaCha20 under SHA-256 of the seed.

    It stands in for Flower's function of the same arguments.

    Raises:
        ConfigError: another modulus, for which the numbers would not be uniform.
    """
    if num_range != MODULUS:
        raise ConfigError(f"secure aggregation modulo {num_range}; only 2^32 is supported")
    key = hashlib.sha256(b"fedsea mask" + seed).digest()
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    masks: Masks = []
    for shape in dimensions_list:
        count = int(np.prod(shape, dtype=np.int64))
        words = np.frombuffer(stream.update(bytes(4 * count)), dtype="<u4")
        masks.append(words.astype(np.int64).reshape(shape))
    return masks


def strengthen() -> None:
    """Let Flower's protocol, in this process, expand its masks with `expand`.

    Raises:
        ConfigError: this version of Flower has no such function where it is expected.
    """
    for name in _EXPANDS:
        module = importlib.import_module(name)
        if not callable(getattr(module, _NAME, None)):
            raise ConfigError(
                "this version of Flower expands masks in another place, where they would be weak; "
                "install flwr 1.41"
            )
        setattr(module, _NAME, expand)


class _Workflow(SecAggPlusWorkflow):
    """Flower's protocol, which would fail where a client leaves before it has shared its keys."""

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        """As Flower does it; then only those who shared their keys are of the round."""
        enough = super().share_keys_stage(grid, context, state)
        there = set(state.active_node_ids)
        state.sampled_node_ids = there
        state.nid_to_neighbours = {node: state.nid_to_neighbours[node] & there for node in there}
        return enough


def workflow(terms: SecureSection, cohort: int) -> SecAggPlusWorkflow:
    """A round of Flower's protocol for so many clients, each with a share of all."""
    strengthen()
    return _Workflow(
        num_shares=1.0,
        reconstruction_threshold=terms.threshold(cohort),
        max_weight=terms.max_weight,
        clipping_range=float(terms.clip),
        quantization_range=LEVELS,
        modulus_range=MODULUS,
        timeout=terms.timeout_s,
    )


def check(terms: SecureSection, setup: ConfigRecord) -> None:
    """Refuse a set-up that is weaker than these terms.

    Raises:
        PermissionDenied: too few clients, a lower threshold, or another grid.
    """
    cohort, threshold = setup.get(Key.SAMPLE_NUMBER), setup.get(Key.THRESHOLD)
    if not isinstance(cohort, int) or cohort < terms.least:
        raise PermissionDenied(
            f"a round of {cohort!r} clients; this client takes part with {terms.least} or more"
        )
    needed = terms.threshold(cohort)
    if not isinstance(threshold, int) or threshold < needed:
        raise PermissionDenied(
            f"updates of {cohort} clients could be unmasked by {threshold!r}; "
            f"this client insists on {needed}"
        )
    if setup.get(Key.SHARE_NUMBER) != cohort or setup.get(Key.MOD_RANGE) != MODULUS:
        raise PermissionDenied("shares or modulus of the round are not as agreed")
    if (setup.get(Key.CLIPPING_RANGE), setup.get(Key.MAX_WEIGHT)) != (
        float(terms.clip),
        terms.max_weight,
    ) or setup.get(Key.TARGET_RANGE) != LEVELS:
        raise PermissionDenied(
            "the clip range or the largest weight of the round is not as this client's settings "
            "say; agree on secure.clip and secure.max_weight"
        )


def guard(
    terms: SecureSection | None,
) -> Callable[[Message, Context, Callable[..., Message]], Message]:
    """Flower's client side of the protocol under a client's own terms.

    Args:
        terms: None refuses secure rounds, and lets plain ones pass; otherwise the reverse.
    """
    strengthen()

    def mod(message: Message, context: Context, call_next: Callable[..., Message]) -> Message:
        if message.metadata.message_type != _TRAIN:
            return call_next(message, context)
        records = message.content.config_records
        secure = records.get(RECORD_KEY_CONFIGS)
        if terms is None:
            if secure is not None:
                raise PermissionDenied(
                    "the aggregator asks for secure aggregation; give this client a [secure] table"
                )
            return call_next(message, context)
        if secure is None:
            raise PermissionDenied(
                "the aggregator asks for an update in clear; "
                "this client takes part in secure aggregation only"
            )
        stage = secure.get(Key.STAGE)
        if stage == Stage.SETUP:
            check(terms, secure)
        elif stage == Stage.UNMASK:
            _check_unmask(secure, terms)
        with _rounding():
            reply = secaggplus_mod(message, context, _seeded(call_next))
        if stage == Stage.COLLECT_MASKED_VECTORS:
            blank(reply)
        return reply

    return mod


@contextlib.contextmanager
def _rounding() -> Iterator[None]:
    """Leave numpy's global generator, with which Flower rounds, as it was."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)


def _seeded(call_next: Callable[..., Message]) -> Callable[..., Message]:
    """Round by a seed of the update itself, so that a round that is repeated gives the same sum.

    Masks have nothing to do with it: they come from the operating system.
    """

    def call(message: Message, context: Context) -> Message:
        reply = call_next(message, context)
        digest = hashlib.sha256(b"fedsea rounding")
        for record in reply.content.array_records.values():
            for array in record.values():
                digest.update(array.data)
        np.random.seed(int.from_bytes(digest.digest()[:4], "little"))
        return reply

    return call


def _check_unmask(secure: ConfigRecord, terms: SecureSection) -> None:
    active, dead = secure.get(Key.ACTIVE_NODE_ID_LIST), secure.get(Key.DEAD_NODE_ID_LIST)
    if not isinstance(active, list) or not isinstance(dead, list):
        raise PermissionDenied("the request for shares names no clients")
    if set(active) & set(dead):
        # Both secrets of one client would take all masks off its update.
        raise PermissionDenied("both secrets of one client were asked for; none is given")
    if len(set(active)) < terms.least:
        raise PermissionDenied(
            f"the sum of {len(set(active))} updates would be unmasked; "
            f"this client insists on {terms.least}"
        )


def blank(reply: Message) -> None:
    """Take the number of examples and the metrics out of a masked reply."""
    for name, record in reply.content.metric_records.items():
        if name.endswith("num_examples"):
            for key in list(record):
                record[key] = 1
    for name, config in reply.content.config_records.items():
        if name.endswith("metrics"):
            for key in list(config):
                del config[key]
