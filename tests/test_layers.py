"""Who may import what (ARCHITECTURE.md): read from the sources, so that no test needs vLLM to hold it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvoffload"

# Each part, and the parts of kvoffload it may import beside itself. A new file must be given its place here.
VOCABULARY = {"types", "table", "layout", "errors", "garbage", "_rows"}
SHARED = VOCABULARY | {"config", "slots", "metrics"}
SCHEDULER_SIDE = {"manager", "admission", "books", "index", "ssd_rows", "drives", "breaker", "estimates", "policy", "store"}
EVERYTHING = SHARED | SCHEDULER_SIDE | {"engine", "worker", "memory"}
MAY_IMPORT = {
    "__init__": set(),
    "_rows": set(),  # the C extension
    "errors": set(),
    "garbage": set(),
    "layout": {"errors"},
    "memory": set(),
    "types": {"errors", "layout"},
    "table": {"types"},
    "config": VOCABULARY,
    "slots": VOCABULARY,
    "metrics": VOCABULARY,
    "engine": SHARED,
    "worker": SHARED | {"engine"},
    "policy": SHARED,
    "blocks": SHARED,
    "ssd_rows": SHARED | {"blocks"},
    "store": SHARED,
    "breaker": SHARED,
    "estimates": SHARED,
    "admission": SHARED,
    "drives": SHARED | {"breaker", "policy", "blocks"},
    "index": SHARED | {"drives", "policy", "blocks", "ssd_rows", "admission"},
    "books": SHARED | {"index", "drives", "blocks"},
    "manager": SHARED | {"index", "books", "drives", "breaker", "policy", "blocks", "store", "admission"},
    "vllm": EVERYTHING,
    "cli": EVERYTHING | {"vllm"},
}
RIM = ("vllm", "cli")
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    """ "store" of kvoffload/store/journal.py, "manager" of kvoffload/manager.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Dotted names of all modules that the file imports, wherever in the file, also for type checking only."""
    package = [PACKAGE.name, *file.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*module, name.name]) for name in node.names}
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_respect_the_layers(file):
    part = part_of(file)
    assert part in MAY_IMPORT, f"give {part} its place in MAY_IMPORT"
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("kvoffload.")}
    ours -= {part, "__version__"}
    assert ours <= MAY_IMPORT[part], f"{part} may not import {sorted(ours - MAY_IMPORT[part])}"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_rim_imports_vllm_and_torch(file):
    foreign = {name.split(".")[0] for name in imports(file)} & {"vllm", "torch", "transformers"}
    assert not foreign or part_of(file) in RIM, f"imports {sorted(foreign)}"


def test_scheduler_side_and_worker_side_do_not_know_each_other():
    """What the table above must always say."""
    for part in SCHEDULER_SIDE:
        assert not MAY_IMPORT[part] & {"worker", "engine"}
    assert not MAY_IMPORT["worker"] & SCHEDULER_SIDE
    for part in SHARED:
        assert MAY_IMPORT[part] <= VOCABULARY
