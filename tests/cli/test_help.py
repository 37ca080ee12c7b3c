"""What `--help` shows fits a screen, a narrow one too, and gives an example."""

from pathlib import Path

import pytest
import typer

from kvoffload.cli import app

COMMANDS = ("serve", "simulate", "inspect", "verify", "clean", "bench", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_gives_an_example_and_the_exit_codes(kvoffload, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    done = kvoffload(command, "--help")
    lines = done.out.rstrip().splitlines()
    assert done.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80
    assert "\u2026" not in done.out  # no name is cut
    assert f"Example: kvoffload {command} " in done.out and "Exit code: 0" in done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_given_in_a_test_of_its_command(command):
    text = (Path(__file__).parent / f"test_{command}.py").read_text()
    options = {name for option in typer.main.get_command(app).commands[command].params for name in option.opts if name[0] == "-"}
    assert {name for name in options - {"--help"} if f'"{name}' not in text} == set()
