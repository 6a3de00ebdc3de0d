"""`fedsea inspect`: what a cut costs, read from headers only."""

from __future__ import annotations

import json

from fedsea.demo import model_path


def test_the_table_has_both_sides_and_every_codec_of_floats(fedsea):
    """What people see of a model, without those codecs that only mechanisms write."""
    found = fedsea("inspect", model_path(), "--bottom", 2, "--top", 2)

    assert found.exit_code == 0, found.stderr
    assert all(word in found.stdout for word in ("2:6", "fp32", "bf16", "fp16", "int8"))
    assert "counts" not in found.stdout


def test_programs_get_the_same_as_json(fedsea):
    """One row of each codec, in bytes: 128 numbers, and a scale of two bytes for int8."""
    found = fedsea("inspect", model_path(), "--json")

    sizes = json.loads(found.stdout)["wire"]
    assert {name: size["token_up"] for name, size in sizes.items()} == {
        "fp32": 512,
        "bf16": 256,
        "fp16": 256,
        "int8": 130,
    }
