"""Writes docs/configuration.md from the pydantic model that checks the configuration.

    python tools/config_reference.py
"""

from pathlib import Path
from typing import get_args

from kvoffload.config import Config

FILE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Keys of vLLM's `kv_connector_extra_config`, and flags of `kvoffload serve`, where they are written with dashes or underscores. A GB
is 10^9 bytes. Sizes are for the whole deployment, all ranks together. An unknown key, a bad value or an unusable path is refused at
start with a sentence that says what to do; nothing is changed on disk.

"""
TAIL = """
With both sizes 0 it is plain vLLM. `kvoffload serve` with a path and no size takes -1 for the SSD tier.

## For one request

A request may say what is done with what it hits, where vLLM is 0.31 or newer: `"kv_transfer_params": {"kvoffload": "load"}` loads
all of it, `{"kvoffload": "recompute"}` nothing. Without it kvoffload decides by what loading and computing took lately.
`cache_salt`, vLLM's own, keeps users' caches apart: see [Security](security.md).
"""


def default(name: str) -> str:
    value = Config.model_fields[name].default
    if value in (None, ()):
        return "none"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value).lower()


def flag(name: str) -> str:
    """As `kvoffload serve` has it."""
    dashed = "--" + name.replace("_", "-")
    return f"`{dashed}`, `--no-resume-kv-cache`" if name == "resume_kv_cache" else f"`{dashed}`"


def values(name: str) -> str:
    field = Config.model_fields[name]
    if field.annotation is bool:
        return "true, false"
    if name == "nvme_path":
        return "path or paths"
    literals = [value for value in get_args(field.annotation) if isinstance(value, str)]
    return ", ".join(f'"{value}"' for value in literals) or "GB"


def reference() -> str:
    rows = ["| key | flag | values | default | meaning |", "|---|---|---|---|---|"]
    for name, field in Config.model_fields.items():
        rows.append(f"| `{name}` | {flag(name)} | {values(name)} | {default(name)} | {field.description} |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


if __name__ == "__main__":
    FILE.write_text(reference())
