"""The memory there is to take from is what the machine has, or what its control group allows."""

import os
from pathlib import Path

import pytest

from kvoffload.memory import available_memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
V1_NO_LIMIT = 2**63 - 4096


def found(root: Path, groups: str, **limits: object) -> int:
    """Of a machine with such a /proc/self/cgroup and such limits; `__` stands for a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, limit in limits.items():
        path = name.replace("__", "/")
        file = root / "sys/fs/cgroup" / (path + (".limit_in_bytes" if path.startswith("memory/") else ".max"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return available_memory(root)[0]


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory": "max"}, MACHINE),
        ("0::/\n", {"memory": 1000}, 1000),
        ("0::/a/b\n", {"a__b__memory": "max", "a__memory": 2000}, 2000),
        ("0::/a/b\n", {"a__b__memory": 3000, "a__memory": 2000}, 2000),
        ("0::/a/b\n", {"other__memory": 1}, MACHINE),
        ("0::/host/path\n", {"memory": 4000}, 4000),
        ("3:cpu,cpuacct:/x\n2:memory:/a\n", {"memory__a__memory": 5000}, 5000),
        ("2:memory:/docker/id\n", {"memory__memory": 6000}, 6000),
        ("2:memory:/a\n0::/a\n", {"memory__a__memory": V1_NO_LIMIT}, MACHINE),
        ("0::/a:b\n", {"a:b__memory": 7000}, 7000),
        ("", {}, MACHINE),
    ],
)
def test_a_control_groups_limit_counts_and_those_above_it(tmp_path, groups, limits, expected):
    assert found(tmp_path, groups, **limits) == expected


def test_more_than_the_machine_has_is_no_limit(tmp_path):
    assert found(tmp_path, "0::/\n", memory=MACHINE * 2) == MACHINE


def test_it_is_said_whose_memory_it_is(tmp_path):
    assert available_memory(tmp_path) == (MACHINE, "this machine has")
    found(tmp_path, "0::/\n", memory=1000)
    assert available_memory(tmp_path) == (1000, "its container or control group allows")
    assert 0 < available_memory()[0] <= MACHINE
