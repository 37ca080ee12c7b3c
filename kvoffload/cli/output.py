"""What the commands have in common: paths as engines call them, figures for people, JSON for programs."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from kvoffload.errors import UserError

FOUND = 1  # exit code: what was looked for was found, or what was asked for could not be done in full
PIPE_WIDTH = 1000
NAME_WIDTH = 12  # of a namespace as it is shown, by which a row is told from others
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_SPANS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def absolute(paths: Sequence[str]) -> list[str]:
    """As the configuration has them: symlinks stay visible, so that the store can refuse them."""
    if "" in paths:  # an unset variable of a script, which would be the working directory
        raise UserError("a path is empty: name a directory")
    found = [os.path.abspath(path) for path in paths]
    for path in found:
        if found.count(path) > 1:
            raise UserError(f"{path} is named more than once: name each path once")
        other = next((other for other in found if other != path and _are_one(path, other)), None)
        if other is not None:
            raise UserError(f"{path} and {other} are one directory: name it once")
    return found


def _are_one(path: str, other: str) -> bool:
    """By a bind mount, or a symlink above them."""
    try:
        return os.path.samestat(os.lstat(path), os.lstat(other))
    except OSError:
        return False  # whoever opens them says why


def amount(nbytes: float) -> str:
    """In units of 1000, as the settings are."""
    unit = 0
    while nbytes >= 999.5 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1000, unit + 1
    return f"{nbytes:.3g} {_UNITS[unit]}"


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def ago(moment: float) -> str:
    """How long ago, of seconds since 1970."""
    seconds = max(0, time.time() - moment)
    for length, unit in _SPANS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def plain(text: object) -> Text:
    """Of text that may come from a file: neither markup nor control characters take effect."""
    return Text(printable(text))


def printable(text: object) -> str:
    return "".join(character if character.isprintable() else "?" for character in str(text))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    # What does not fit is folded: half of a path or a process is no use.
    made = Table(*(Column(name, overflow="fold") for name in columns), title=plain(title), title_justify="left", title_style="bold")
    made.columns[0].no_wrap = all(len(str(row[0])) <= NAME_WIDTH for row in rows)
    for row in rows:
        made.add_row(*(plain(cell) for cell in row))
    console = Console()
    if not console.is_terminal:  # a pipe has no width; there a row stays a line
        console.width = max(console.width, console.measure(made, options=console.options.update(width=PIPE_WIDTH)).maximum)
    console.print(made)


def say(text: str) -> None:
    Console(soft_wrap=True, highlight=False).print(plain(text))


def as_json(found: Mapping[str, Any] | Sequence[Any]) -> None:
    json.dump(found, sys.stdout, indent=2)
    print()
