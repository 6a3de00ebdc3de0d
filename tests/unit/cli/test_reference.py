from __future__ import annotations

from scripts.cli_reference import PAGE, page

from fedsea.cli.app import app


def test_the_page_is_up_to_date():
    """docs/reference/cli.md is what the commands say; scripts/cli_reference.py writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_command_and_option_is_on_the_page(fedsea):
    """The page names all commands, those of groups too, and options under their real names."""
    text = PAGE.read_text(encoding="utf-8")

    for command in app.registered_commands:
        assert f"## fedsea {command.name}\n" in text
    for words in ("## fedsea certs init\n", "`--set`", "`--kill/--no-kill`", "`FEDSEA_CERTS`"):
        assert words in text
