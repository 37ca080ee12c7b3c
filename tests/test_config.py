import math

import pytest
from pydantic import ValidationError

from kvoffload.config import Config
from kvoffload.errors import ConfigError


def message(mapping: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.parse(mapping)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_nothing_set_is_off() -> None:
    config = Config.parse({})
    assert not config.enabled
    assert (config.dram_bytes, config.ssd_bytes, config.nvme_path) == (0, 0, ())
    assert config.resume_kv_cache


def test_gb_is_ten_to_the_ninth() -> None:
    config = Config.parse({"nvme_path": "/a", "dram_kv_offload_gb": 1.5, "ssd_kv_offload_gb": 3})
    assert (config.dram_bytes, config.ssd_bytes) == (1_500_000_000, 3_000_000_000)


def test_minus_one_is_automatic() -> None:
    assert Config.parse({"nvme_path": "/a", "ssd_kv_offload_gb": -1}).ssd_bytes is None


def test_disable_kv_cache_wins_over_sizes() -> None:
    assert Config.parse({"dram_kv_offload_gb": 1}).enabled
    assert not Config.parse({"dram_kv_offload_gb": 1, "disable_kv_cache": True}).enabled


def test_one_path_or_a_list_of_paths_made_absolute() -> None:
    assert Config.parse({"nvme_path": "/a/"}).nvme_path == ("/a",)
    assert Config.parse({"nvme_path": ["/b", "/a/../c"]}).nvme_path == ("/b", "/c")
    assert Config.parse({"nvme_path": None}).nvme_path == ()


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config.parse({}).dram_kv_offload_gb = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("nvm_path", "nvme_path"), ("dram_gb", "dram_kv_offload_gb"), ("resume-kv-cache", "resume_kv_cache")],
)
def test_unknown_key_names_the_nearest(typed: str, meant: str) -> None:
    assert message({typed: 1}) == f"unknown configuration key {typed!r}: did you mean {meant!r}?"


@pytest.mark.parametrize("name", ["dram_kv_offload_gb", "ssd_kv_offload_gb"])
@pytest.mark.parametrize("value", ["10", "ten", True, False, None, [1], math.nan, math.inf, -math.inf, -0.5, -2])
def test_a_size_that_is_no_size_is_refused(name: str, value: object) -> None:
    assert name in message({"nvme_path": "/a", name: value})


def test_dram_is_never_automatic() -> None:
    assert "dram_kv_offload_gb must be 0 (off) or more, not -1" in message({"dram_kv_offload_gb": -1})


@pytest.mark.parametrize("value", ["true", 1, 0, None])
def test_a_switch_is_true_or_false(value: object) -> None:
    assert message({"resume_kv_cache": value}) == f"resume_kv_cache must be true or false, not {value!r}"


@pytest.mark.parametrize("size", [1, -1])
def test_ssd_needs_a_path(size: int) -> None:
    assert "nvme_path" in message({"ssd_kv_offload_gb": size})


@pytest.mark.parametrize("value", ["", [""], ["/a", ""], 3, [3], {"a": 1}, True, "/a\0b"])
def test_a_path_that_is_no_path_is_refused(value: object) -> None:
    assert "nvme_path" in message({"nvme_path": value})


def test_duplicate_paths_are_refused() -> None:
    assert "/a more than once" in message({"nvme_path": ["/a", "/b", "/a/"]})


@pytest.mark.parametrize("value", [10**400, 1e308, 1e10])
def test_a_size_beyond_every_machine_is_refused(value: float) -> None:
    assert "at most 1000000000" in message({"dram_kv_offload_gb": value})


@pytest.mark.parametrize("name", ["dram_kv_offload_gb", "ssd_kv_offload_gb"])
@pytest.mark.parametrize("value", [1e-10, 5e-324])
def test_a_size_that_rounds_to_no_byte_is_refused(name: str, value: float) -> None:
    assert message({"nvme_path": "/a", name: value}) == f"{name} must be at least one byte, or 0 (off), not {value!r} GB"


def test_the_smallest_size_is_one_byte() -> None:
    assert Config.parse({"dram_kv_offload_gb": 1e-9}).dram_bytes == 1


def test_more_than_64_paths_are_refused() -> None:
    assert len(Config.parse({"nvme_path": [f"/{number}" for number in range(64)]}).nvme_path) == 64
    assert message({"nvme_path": [f"/{number}" for number in range(65)]}) == "nvme_path must list at most 64 paths, not 65"


def test_a_path_that_no_file_name_can_have_is_refused() -> None:
    assert "nvme_path '/a\\ud800' holds characters" in message({"nvme_path": "/a\ud800"})


def test_by_default_all_is_written_without_a_limit() -> None:
    config = Config.parse({"nvme_path": "/a", "ssd_kv_offload_gb": 1})
    assert (config.ssd_admission, config.ssd_write_bytes_per_day) == ("all", None)
    chosen = {"ssd_admission": "second-touch", "ssd_write_gb_per_day": 0.5}
    config = Config.parse({"nvme_path": "/a", "ssd_kv_offload_gb": 1} | chosen)
    assert (config.ssd_admission, config.ssd_write_bytes_per_day) == ("second-touch", 500_000_000)


@pytest.mark.parametrize("value", ["10", True, [1], math.nan, math.inf, -1, 0, 0.0, 1e-10, 1e10])
def test_a_write_budget_that_is_no_budget_is_refused(value: object) -> None:
    assert "ssd_write_gb_per_day" in message({"nvme_path": "/a", "ssd_kv_offload_gb": 1, "ssd_write_gb_per_day": value})


def test_a_write_budget_of_nothing_says_how_to_have_no_limit() -> None:
    said = message({"nvme_path": "/a", "ssd_kv_offload_gb": 1, "ssd_write_gb_per_day": 0})
    assert said == "ssd_write_gb_per_day must be more than 0, not 0: leave it out for no limit"


@pytest.mark.parametrize("value", ["none", "second touch", True, None, 2, ["all"]])
def test_an_admission_that_does_not_exist_is_refused(value: object) -> None:
    said = message({"nvme_path": "/a", "ssd_kv_offload_gb": 1, "ssd_admission": value})
    assert said == f"ssd_admission must be 'all' or 'second-touch', not {value!r}"


@pytest.mark.parametrize(("name", "value"), [("ssd_admission", "second-touch"), ("ssd_write_gb_per_day", 3)])
def test_what_concerns_the_ssd_needs_an_ssd_tier(name: str, value: object) -> None:
    assert message({"dram_kv_offload_gb": 1, name: value}) == (
        f"{name} is set but there is no SSD tier: set ssd_kv_offload_gb or leave it out"
    )
