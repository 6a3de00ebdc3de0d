from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import CheckpointError, NotFinite, RemoteProtocolError
from fedsea.federated.arrays import (
    in_order,
    largest,
    layout_digest,
    named,
    norm,
    packed,
    plus,
    unpacked,
)

ARRAYS = {"b": np.array([[1.0, -2.0]], np.float32), "a": np.array([2.0], np.float32)}


def test_packing_keeps_every_bit():
    """What is packed is unpacked as it was, whatever the order of the names."""
    found = unpacked(packed(dict(reversed(ARRAYS.items()))))

    assert packed(found) == packed(ARRAYS)
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [2.0],
        "b": [[1.0, -2.0]],
    }


@given(st.binary(max_size=200))
def test_any_bytes_are_arrays_or_refused(data):
    """Bytes from the other side give arrays or an error of ours."""
    try:
        found = unpacked(data)
    except RemoteProtocolError:
        return
    assert all(array.dtype == np.float32 for array in found.values())


@pytest.mark.parametrize(
    "array",
    [
        np.array([np.nan], np.float32),
        np.array([np.inf], np.float32),
        np.array([1.0]),
        np.array([1]),
    ],
)
def test_other_numbers_are_refused(array):
    """NaN, infinity and other dtypes do not come in."""
    with pytest.raises(RemoteProtocolError):
        unpacked(packed({"a": array}))


def test_arrays_travel_in_the_order_of_their_names():
    """The names stay at home; the order stands for them."""
    assert [array.tolist() for array in in_order(ARRAYS)] == [[2.0], [[1.0, -2.0]]]
    assert set(named(ARRAYS, in_order(ARRAYS))) == {"a", "b"}


def test_other_numbers_of_arrays_and_shapes_are_refused():
    """An update of another adapter is no update."""
    with pytest.raises(CheckpointError, match="1 arrays came and 2"):
        named(ARRAYS, [np.zeros(1)])
    with pytest.raises(CheckpointError, match="shape"):
        named(ARRAYS, [np.zeros(1), np.zeros(2)])
    with pytest.raises(NotFinite):
        named(ARRAYS, [np.zeros(1), np.full((1, 2), np.nan)])


def test_a_layout_is_names_shapes_and_what_is_fixed():
    """Values that are averaged do not count; shapes, names and frozen values do."""
    digest = layout_digest(ARRAYS, {})

    assert layout_digest({name: array + 1 for name, array in ARRAYS.items()}, {}) == digest
    assert layout_digest({**ARRAYS, "a": np.zeros((1, 1), np.float32)}, {}) != digest
    assert layout_digest({"c": ARRAYS["a"], "b": ARRAYS["b"]}, {}) != digest
    fixed = layout_digest({"a": ARRAYS["a"]}, {"b": ARRAYS["b"]})
    assert fixed != layout_digest({"a": ARRAYS["a"]}, {"b": ARRAYS["b"] + 1})


def test_sums_and_sizes():
    """The arithmetic that strategies are made of."""
    assert plus(ARRAYS, ARRAYS, 0.5)["b"].tolist() == [[1.5, -3.0]]
    assert norm(ARRAYS) == pytest.approx(3.0)
    assert largest(ARRAYS) == 2.0
    assert norm({}) == largest({}) == 0.0
    assert math.isnan(norm({"a": np.array([np.nan], np.float32)}))
