"""The installed vLLM has what the rim uses of it; and the script that says so would notice if it had not."""

from pathlib import Path

import vllm

from kvoffload.vllm import contract
from tests.rim.signatures import check

SOURCES = Path(vllm.__file__).parent


def test_all_that_the_rim_uses_is_in_the_installed_version():
    found = check(SOURCES, contract.VERSION)
    assert not found.problems and found.looked > 100


def test_another_versions_names_and_attributes_are_missed():
    problems = "\n".join(check(SOURCES, (0, 26)).problems)  # what contract.py does for 0.26, looked up in this one
    assert "use_v2_model_runner" not in problems
    broken = check(SOURCES.parent / "torch", contract.VERSION).problems
    assert any("has no OffloadingConnector" in problem for problem in broken)
