"""Writes the Helm chart's values.yaml, values.schema.json and the table in its README from tools/chart_values.py.

    python -m tools.chart_reference
"""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.chart_values import VALUES

CHART = Path(__file__).resolve().parent.parent / "charts" / "kvoffload-inference"
BEGIN, END = "<!-- values: made by tools/chart_reference.py -->", "<!-- end of values -->"
COLUMNS = 118


def is_leaf(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("description"), str)


def leaves(section: dict[str, Any] = VALUES, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    for key, entry in section.items():
        if is_leaf(entry):
            yield (*above, key), entry
        else:
            yield from leaves(entry, (*above, key))


def schema_of(section: dict[str, Any]) -> dict[str, Any]:
    """Null takes a default away: what cannot be missing is required, so that Helm names it."""
    properties = {key: entry if is_leaf(entry) else schema_of(entry) for key, entry in section.items()}
    required = [key for key, entry in section.items() if not is_leaf(entry) or not may_be_null(entry)]
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def may_be_null(leaf: dict[str, Any]) -> bool:
    return "null" in leaf.get("type", ()) or leaf.get("default") in (None, "", [], {})


def schema() -> str:
    made = {"$schema": "http://json-schema.org/draft-07/schema#", **schema_of(VALUES)}
    made["properties"]["global"] = {"type": "object", "description": "Helm's own, for charts that hold this one."}
    return json.dumps(made, indent=1) + "\n"


def values_of(section: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, entry in section.items():
        if not is_leaf(entry):
            yield f"{indent}{key}:"
            yield from values_of(entry, indent + "  ")
        elif "default" in entry:
            yield from textwrap.wrap(entry["description"], COLUMNS, initial_indent=indent + "# ", subsequent_indent=indent + "# ")
            yield f"{indent}{key}: {json.dumps(entry['default'])}"


def values() -> str:
    head = (
        "# Made by `python -m tools.chart_reference` from tools/chart_values.py.\n"
        "# What must be set is vllm.args.model, and image.repository: to where you pushed the image that you built.\n"
    )
    return head + "\n".join(values_of(VALUES)) + "\n"


def table() -> str:
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for path, entry in leaves():
        default = f"`{json.dumps(entry['default'])}`" if "default" in entry else ""
        choices = [choice for choice in entry.get("enum", ()) if choice != ""]
        among = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if len(choices) > 2 else ""
        rows.append(f"| `{'.'.join(path)}` | {default} | {entry['description']}{among} |")
    return "\n".join(rows)


def readme(now: str) -> str:
    before, _, rest = now.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def files() -> dict[Path, str]:
    return {
        CHART / "values.yaml": values(),
        CHART / "values.schema.json": schema(),
        CHART / "README.md": readme((CHART / "README.md").read_text()),
    }


if __name__ == "__main__":
    for file, content in files().items():
        file.write_text(content)
