"""Forked children: what they find out comes back, and so does what they raise."""

import os
import pickle
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Failed(Exception):
    """What the torture was looking for."""


class LastWords:
    """The end of a child: its block's, and `tell` gets the traceback if that raised, else an empty text."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tell("".join(traceback.format_exception(kind, error, trace)) if error else "")
        os._exit(1)


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` gives, done by a child; Failed with its traceback if it raises."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer: list[Any] = []

        def tell(failure: str) -> None:
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump((failure, answer), pipe)

        with LastWords(tell):
            answer.append(work())
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        raise Failed(f"a child ended with status {status}")
    failure, answer = pickle.loads(data)
    if failure:
        raise Failed(failure)
    return answer[0]
