"""Write docs/reference/finetuning.md from the dataclasses that read a fine-tuning's settings.

    python scripts/finetuning_reference.py

A test compares the page with what this script would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

from scripts.configuration_reference import section_text

from fedsea.client.finetuning import FinetuneConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "finetuning.md"
HEAD = """\
# Fine-tuning configuration

<!-- Written by scripts/finetuning_reference.py from fedsea.client.finetuning; change it there. -->

`fedsea finetune --config FILE` reads a TOML file with the sections below. `run.model`, `run.data` and
`run.out` are required, in the file or as options of the command. A key that is not listed here is an
error. Paths are relative to the file.
Options of the command override the file, and `--set SECTION.KEY=VALUE` reaches every key:
see [the command](cli.md#fedsea-finetune) and [the tutorial](../tutorial/finetune.md).

A run in a folder goes on only with the settings that it began with, but for `training.keep`,
`training.save_every` and `training.reconnect_s`.
"""


def page() -> str:
    """The whole page."""
    sections = get_type_hints(FinetuneConfig)
    return "\n".join([HEAD, *(section_text(name, kind) for name, kind in sections.items())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
