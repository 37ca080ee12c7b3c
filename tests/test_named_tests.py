"""README and docs/security.md name a test for each claim."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("page", "least"), [("README.md", 11), ("docs/security.md", 26)])
def test_every_test_that_the_page_names_exists(page, least):
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / page).read_text()))
    assert len(named) >= least
    for file, name in sorted(named):
        functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"
