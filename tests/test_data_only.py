"""What lies on disk is data and never becomes code: nothing is unpickled or evaluated, and readers take only what is written."""

import ast
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from kvoffload.errors import StoreError
from kvoffload.store import Digests, journal
from kvoffload.store.directory import Directory
from kvoffload.store.namespace import Manifest
from kvoffload.types import COMPLETION_DTYPE, OP_DTYPE
from tests.store.helpers import namespace_of, open_store

PACKAGE = Path(__file__).resolve().parent.parent / "kvoffload"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Modules that make objects, or run code, from bytes.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dbm", "dill", "cloudpickle", "joblib", "runpy", "imp", "code",
    "jsonpickle", "pandas",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "np.fromfile"}
FORBIDDEN_CALLS |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "Loader", "UnsafeLoader")}


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [node.module] if node.module.split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in FORBIDDEN_CALLS or name.split(".")[-1] == "import_module" else []
            found += [word.arg for word in node.keywords if word.arg == "allow_pickle"]
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_unpickles_or_evaluates(file: Path) -> None:
    assert findings(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from marshal import loads",
        "import shelve as s",
        "eval(text)",
        "exec(text)",
        "yaml.load(file, yaml.Loader)",
        "yaml.unsafe_load(file)",
        "np.load(path)",
        "numpy.lib.format.read_array(file, allow_pickle=True)",
        "torch.load(path)",
        "importlib.import_module(name)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert findings(source) != []


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self._target}",))


@pytest.mark.parametrize("name", ["manifest.json", "index.journal", "rank0of2.slots", "lock", "../digests.json", "../.lock"])
def test_a_pickle_in_the_place_of_any_file_is_never_opened_as_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "nvme").mkdir()
    open_store(tmp_path / "nvme").close()
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (namespace_of(tmp_path / "nvme") / name).write_bytes(bomb * 200)
    Digests.load(str(tmp_path / "nvme"))
    if name in ("manifest.json", "index.journal", "rank0of2.slots"):
        with pytest.raises(StoreError, match="is damaged"):
            open_store(tmp_path / "nvme")
        open_store(tmp_path / "nvme", resume_kv_cache=False).close()
    else:
        open_store(tmp_path / "nvme").close()
    assert not (tmp_path / "exploded").exists()


def test_records_on_disk_and_in_messages_are_numbers_and_bytes() -> None:
    for dtype in (journal._RECORD_DTYPE, OP_DTYPE, COMPLETION_DTYPE):
        assert not dtype.hasobject
        assert {dtype[name].base.kind for name in dtype.names} <= set("uiV")
    assert np.dtype(object).hasobject


def test_a_manifest_gives_five_fields_of_known_types_whatever_else_it_holds(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    path = namespace_of(tmp_path) / "manifest.json"
    strange = {"identity": {"__class__": "os.system"}, "__reduce__": ["os.system", "true"], "created": ["list"], "more": [1] * 9}
    path.write_text(json.dumps(json.loads(path.read_text()) | strange))
    with Directory.open(str(path.parent)) as directory:
        manifest = Manifest.read(directory)
    assert manifest is not None
    assert [type(value) for value in vars(manifest).values()] == [int, tuple, int, int, str]
