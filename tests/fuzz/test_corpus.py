"""What `make fuzz` found and what it begins with, replayed without a fuzzer: every input keeps the promises of its target."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

from kvoffload.store.directory import Directory
from tests.fuzz.build import TARGETS, build_replays
from tests.fuzz.run import CORPUS, STORE_TARGETS, write_seeds
from tests.patience import PATIENCE_S
from tests.sanitizers import FLAGS


def inputs(name: str, folder: Path) -> list[Path]:
    """The corpus, and the seeds as files in the folder."""
    files = sorted((CORPUS / name).iterdir())
    assert files, "there is nothing to replay"
    return [*files, *write_seeds(name, folder / "seeds")]


@pytest.fixture(scope="module")
def replays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_replays(tmp_path_factory.mktemp("replays"), FLAGS)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_for_the_engine_keeps_its_promises(name: str, replays: dict[str, Path], tmp_path: Path) -> None:
    command = [str(replays[name]), *map(str, inputs(name, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", STORE_TARGETS)
def test_what_was_found_for_the_store_keeps_its_promises(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    target = importlib.import_module(f"tests.fuzz.{name}")
    with Directory.open(str(tmp_path)) as directory:
        for file in inputs(name, tmp_path_factory.mktemp("inputs")):
            print(file)  # the last one named is the one that failed
            target.one_input(file.read_bytes(), directory)


def test_every_corpus_has_a_target() -> None:
    assert sorted(folder.name for folder in CORPUS.iterdir()) == sorted([*TARGETS, *STORE_TARGETS])
