"""What is printed reaches whoever reads it, or the command says why not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import fill
from tests.patience import PATIENCE_S

PROGRAM = "from kvoffload.cli import main; main()"


def inspected(path: Path, stdout: Any, **added: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "inspect", str(path)]
    environment = os.environ | added
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, encoding="latin-1", env=environment, timeout=PATIENCE_S, check=False
    )


def test_output_that_the_system_does_not_take_is_one_sentence_and_not_what_damage_gives(tmp_path):
    fill(tmp_path)
    with Path("/dev/full").open("w") as full:
        done = inspected(tmp_path, stdout=full)
    assert done.returncode == 2 and "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_seen_enough_is_told_nothing(tmp_path):
    fill(tmp_path)
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = inspected(tmp_path, stdout=write_end)
    os.close(write_end)
    assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_are_shown_in_any_encoding(tmp_path, encoding):
    fill(tmp_path, model="modèle-模型")
    done = inspected(tmp_path, stdout=subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == "" and "mod" in done.stdout
