"""Style that a test can hold: short files, short functions, no catch-all handlers, no notes to self."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
LINE_CHARACTERS_MAX = 132
NOTES = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")  # in pieces, or this file would fail itself


def sources() -> list[Path]:
    suffixes = {".py", ".pyi", ".c", ".h"}
    folders = ("kvoffload", "csrc", "tests", "examples", "benchmarks", "tools", "charts")
    found = [ROOT / "setup.py", *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    return sorted(file for file in found if file.suffix in suffixes)


SOURCES = sources()
PYTHON = [file for file in SOURCES if file.suffix == ".py"]
C = [file for file in SOURCES if file.suffix in (".c", ".h")]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def python_functions(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def c_functions(file: Path) -> Iterator[tuple[str, int]]:
    """From a line that opens a brace at its end and begins in column 0, to the closing brace in column 0."""
    opened = None
    for number, line in enumerate(file.read_text().splitlines()):
        if line == "}" and opened is not None:
            yield opened[0], number - opened[1] + 1
            opened = None
        elif opened is None and re.match(r"\w[^;]*\)\s*\{$", line):
            opened = line, number
        elif opened is None and line == "{":
            opened = f"before line {number + 1}", number


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_files_are_short_and_hold_no_notes_to_self(file):
    lines = file.read_text().splitlines()
    assert len(lines) < FILE_LINES_MAX
    assert not [line for line in lines if len(line) > LINE_CHARACTERS_MAX]
    assert not [line for line in lines if NOTES.search(line)]


@pytest.mark.parametrize("file", PYTHON + C, ids=name)
def test_functions_are_short(file):
    functions = python_functions(file) if file.suffix == ".py" else c_functions(file)
    assert not [(function, lines) for function, lines in functions if lines >= FUNCTION_LINES_MAX]


@pytest.mark.parametrize("file", PYTHON, ids=name)
def test_no_handler_catches_everything(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id for kind in caught if isinstance(kind, ast.Name)}
            assert not names & {"Exception", "BaseException"}, f"line {node.lineno}"


def test_nothing_built_is_in_the_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [file for file in listed if re.search(r"\.(so|o|pyc|whl|log)$|(^|/)(build|\.venv)/", file)]
