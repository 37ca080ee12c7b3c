"""What `--help` shows fits a screen, a narrow one too, and gives an example."""

import pytest

COMMANDS = ("serve", "simulate", "inspect", "verify", "clean", "bench", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_gives_an_example_and_the_exit_codes(kvoffload, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    done = kvoffload(command, "--help")
    lines = done.out.rstrip().splitlines()
    assert done.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80
    assert "\u2026" not in done.out  # no name is cut
    assert f"Example: kvoffload {command} " in done.out and "Exit code: 0" in done.out
