"""Traces of requests: the blocks that each prompt consists of, in the order in which the requests came."""

import json
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from kvoffload.errors import UserError
from kvoffload.types import BlockKey

MOONCAKE_TOKENS = 512  # in a block of the traces published with Mooncake
BAILIAN_TOKENS = 16  # in one of those that Alibaba's Bailian (qwen-bailian) publishes; their requests name a chat
TIME_MAX = 1e15  # of a timestamp, in either unit


class Trace(NamedTuple):
    requests: list[list[BlockKey]]  # each the blocks of its prompt in prefix order
    seconds: list[float]  # when each came; 0 where the trace does not tell
    block_tokens: int
    answers: list[int]  # tokens that each was answered with; 0 where the trace does not tell

    @property
    def blocks(self) -> int:
        """Different ones."""
        return len({key for request in self.requests for key in request})

    @property
    def uses(self) -> int:
        return sum(map(len, self.requests))


def read(file: Path, limit: int | None = None) -> Trace:
    """JSON lines of either kind, told apart by `chat_id`; the first `limit` requests. Mooncake's timestamps are milliseconds,
    Bailian's seconds. A number is taken for a block together with those before it, as vLLM's hashes are of all tokens up to the
    block's end, whether or not the trace's numbers are."""
    keys: dict[tuple[BlockKey, int], BlockKey] = {}  # by the block before, and the number
    requests, seconds, answers = [], [], []
    block_tokens, ticks = MOONCAKE_TOKENS, 1e-3
    for number, row in islice(_rows(file), limit):
        ids = row.get("hash_ids")
        if not isinstance(ids, list) or not all(isinstance(block, int) for block in ids):
            raise UserError(f"{file}, line {number}: no list of numbers in hash_ids; give a Mooncake or Bailian trace")
        if "chat_id" in row:
            block_tokens, ticks = BAILIAN_TOKENS, 1.0
        came = row.get("timestamp", 0)
        if isinstance(came, bool) or not isinstance(came, int | float) or not abs(came) < TIME_MAX:
            raise UserError(f"{file}, line {number}: timestamp {came!r:.40} is no time; give a Mooncake or Bailian trace")
        requests.append(_chain(keys, ids))
        seconds.append(came * ticks)
        answer = row.get("output_length", 0)
        answers.append(answer if type(answer) is int and answer > 0 else 0)
    if not any(requests):
        raise UserError(f"{file} holds no requests with blocks; give a trace in JSON lines")
    return Trace(requests, seconds, block_tokens, answers)


def _chain(keys: dict[tuple[BlockKey, int], BlockKey], ids: list[int]) -> list[BlockKey]:
    chain, before = [], b""
    for block in ids:
        key = keys.get((before, block))
        if key is None:
            key = keys[before, block] = blake2b(before + str(block).encode(), digest_size=16).digest()
        chain.append(key)
        before = key
    return chain


def _rows(file: Path) -> Iterator[tuple[int, dict]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _row(file, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); give a trace in JSON lines") from error


def _row(file: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # of numbers of thousands of digits, and of thousands of brackets
        raise UserError(f"{file}, line {number} is not JSON ({error}); give a trace in JSON lines") from error
    if not isinstance(row, dict):
        raise UserError(f"{file}, line {number} is not a request; give a Mooncake or Bailian trace")
    return row
