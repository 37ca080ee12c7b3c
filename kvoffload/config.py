"""What a user may set in `kv_connector_extra_config`, checked once at start."""

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError

GB = 10**9
AUTOMATIC = -1.0
_GB_MAX = 10**9  # an exabyte
Admissions = Literal["all", "second-touch"]
_PATHS_MAX = 64  # far beyond a machine's drives; every path holds one file for every rank open


def _as_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number of GB (10^9 bytes), not {value!r}")
    if not abs(value) <= _GB_MAX:  # so written, NaN is refused too
        raise ValueError(f"{name} must be a finite number of GB, at most {_GB_MAX}, not {value!r}")
    if value > 0 and round(value * GB) == 0:  # it would count as off here and as set there
        raise ValueError(f"{name} must be at least one byte, or 0 (off), not {value!r} GB")
    return float(value)


class Config(BaseModel):
    """The user's settings. Sizes are GB of 10^9 bytes for the whole deployment, all ranks together. Immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Descriptions are the reference in docs/configuration.md (tools/config_reference.py). Paths are absolute here.
    nvme_path: tuple[str, ...] = Field(
        (),
        description="Directory for the SSD tier, or a list of directories, one for each drive, that blocks are striped over. "
        "Needed when `ssd_kv_offload_gb` is not 0. Everything lies in a folder `kvoffload` below it.",
    )
    dram_kv_offload_gb: float = Field(
        0.0,
        description="Cap of the DRAM tier. With 0, blocks pass through a bounce pool (outside the cap, at most 2.5 GB per rank) "
        "straight to the SSD.",
    )
    ssd_kv_offload_gb: float = Field(
        0.0,
        description="Cap of everything below `nvme_path`, all ranks and caches together. 0: no SSD tier. -1: automatic, 80 % of "
        "what is free. Whatever it allows, 2 % of the file system (at most 10 GiB) stays free for others.",
    )
    ssd_admission: Admissions = Field(
        "all", description='"second-touch": a block is written to the SSD only once a second request uses it.'
    )
    ssd_write_gb_per_day: float | None = Field(
        None,
        description="Budget of this deployment's writes to the SSD, evenly over the day; an hour's worth may be saved up. While it "
        "is short, blocks used before come first.",
    )
    resume_kv_cache: bool = Field(True, description="Use what an earlier run left; false: start empty.")
    clean_obsolete_kv_cache: bool = Field(
        False, description="Remove caches below `nvme_path` that do not match this deployment and that nobody uses."
    )
    disable_gpu_reuse: bool = Field(False, description="Ignore prefixes that are still in GPU memory.")
    disable_long_token: bool = Field(
        False, description="Keep blocks of prompts only; by default blocks of generated tokens are kept as well."
    )
    disable_kv_cache: bool = Field(False, description="Plain vLLM.")

    @classmethod
    def parse(cls, mapping: Mapping[str, Any]) -> Self:
        """Check `mapping` and fill in defaults; ConfigError says in one sentence what the first mistake is."""
        for key in mapping:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.0)[0]
                raise ConfigError(f"unknown configuration key {key!r}: did you mean {near!r}?")
        try:
            return cls.model_validate(dict(mapping))
        except ValidationError as error:
            raise ConfigError(_sentence(error)) from None

    @property
    def dram_bytes(self) -> int:
        return round(self.dram_kv_offload_gb * GB)

    @property
    def ssd_bytes(self) -> int | None:
        """The cap on everything below the nvme paths together; 0 is off, None is automatic."""
        return None if self.ssd_kv_offload_gb == AUTOMATIC else round(self.ssd_kv_offload_gb * GB)

    @property
    def ssd_write_bytes_per_day(self) -> int | None:
        return None if self.ssd_write_gb_per_day is None else round(self.ssd_write_gb_per_day * GB)

    @property
    def enabled(self) -> bool:
        return not self.disable_kv_cache and (self.dram_kv_offload_gb != 0 or self.ssd_kv_offload_gb != 0)

    @field_validator("nvme_path", mode="before")
    @classmethod
    def _check_paths(cls, value: object) -> tuple[str, ...]:
        listed = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(path, str) for path in listed):
            raise ValueError(f"nvme_path must be a path or a list of paths, not {value!r}")
        if not all(listed) or any("\0" in path for path in listed):
            raise ValueError("nvme_path must not hold an empty path or a NUL byte")
        if len(listed) > _PATHS_MAX:
            raise ValueError(f"nvme_path must list at most {_PATHS_MAX} paths, not {len(listed)}")
        for path in listed:
            try:
                os.fsencode(path)
            except UnicodeEncodeError:
                raise ValueError(f"nvme_path {path!r} holds characters that no file name can have") from None
        # Symlinks stay visible in the result, so that the store can refuse them.
        paths = tuple(os.path.abspath(path) for path in listed)
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"nvme_path names {path} more than once: list each path once")
        return paths

    @field_validator("dram_kv_offload_gb", mode="before")
    @classmethod
    def _check_dram(cls, value: object) -> float:
        size = _as_number("dram_kv_offload_gb", value)
        if size < 0:
            raise ValueError(f"dram_kv_offload_gb must be 0 (off) or more, not {value!r}")
        return size

    @field_validator("ssd_kv_offload_gb", mode="before")
    @classmethod
    def _check_ssd(cls, value: object) -> float:
        size = _as_number("ssd_kv_offload_gb", value)
        if size < 0 and size != AUTOMATIC:
            raise ValueError(f"ssd_kv_offload_gb must be 0 (off), -1 (automatic) or more than 0, not {value!r}")
        return size

    @field_validator("ssd_admission", mode="before")
    @classmethod
    def _check_admission(cls, value: object) -> object:
        if value not in get_args(Admissions):
            raise ValueError(f"ssd_admission must be {' or '.join(map(repr, get_args(Admissions)))}, not {value!r}")
        return value

    @field_validator("ssd_write_gb_per_day", mode="before")
    @classmethod
    def _check_budget(cls, value: object) -> float | None:
        if value is None:
            return None
        size = _as_number("ssd_write_gb_per_day", value)
        if size <= 0:
            raise ValueError(f"ssd_write_gb_per_day must be more than 0, not {value!r}: leave it out for no limit")
        return size

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name in ("ssd_admission", "ssd_write_gb_per_day"):
            if name in self.model_fields_set and getattr(self, name) is not None and self.ssd_kv_offload_gb == 0:
                raise ValueError(f"{name} is set but there is no SSD tier: set ssd_kv_offload_gb or leave it out")
        if self.ssd_kv_offload_gb != 0 and not self.nvme_path:
            raise ValueError("ssd_kv_offload_gb is set but nvme_path is not: name the directory that may hold the cache")
        return self


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("bool_type", "bool_parsing"):
        return f"{name} must be true or false, not {first['input']!r}"
    return f"{name} is not valid: {first['msg']}"
