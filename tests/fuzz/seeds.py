"""Inputs that a fuzzer begins with and `make test` replays beside the corpora: right ones, and right ones with one thing wrong in
each field, under right checksums. What a corpus reaches is code; these are what that code must tell apart."""

import json
import struct
from collections.abc import Iterator

import numpy as np

from kvoffload.store.journal import Kind, Record, encode_header, encode_records
from kvoffload.types import NO_SLOT, OP_DTYPE
from tests.engine.world import copy_in, copy_out, load, read, write
from tests.fuzz import store_journal, store_manifest

HEADER_FIELDS_AT = (0, 8, 12, 16, 24, 32, 47, 48, 49, 55, 56, 95, 96, 103, 104, 119, 120, 127)  # of a slot; first and last bytes
SUPERBLOCK_FIELDS_AT = (0, 7, 8, 12, 16, 20, 24, 28, 32, 40, 55, 56, 63)


def engine_slot() -> Iterator[bytes]:
    block = struct.pack("<HHBB", 7, 3000, 36, 5)
    for flags in range(4):
        yield bytes([flags]) + block
        for at in (*HEADER_FIELDS_AT, 4096, 4096 + 3000, 4096 + 3001):
            yield bytes([flags]) + block + struct.pack("<HB", at, 1)


def engine_superblock() -> Iterator[bytes]:
    for flags in range(4):
        for file_bytes in (0, 4095, 4096, 4096 + 16383, 4096 + 16384, 200_000):
            yield struct.pack("<BIB", flags, file_bytes, 4)
        for at in SUPERBLOCK_FIELDS_AT:
            yield struct.pack("<BIB", flags, 4096 + 2 * 16384, 4) + bytes(at) + b"\1"


def engine_submit() -> Iterator[bytes]:
    def raw(*ops: np.ndarray) -> bytes:
        return b"\1" + np.concatenate(ops).astype(OP_DTYPE).tobytes()

    yield raw(copy_out(1, 0), write(1, 0, 3), load(1, 3, 0), read(1, 2, 3), copy_in(1, 2))
    yield raw(*(copy_out(n % 8, n % 8) for n in range(31)), load(1, 3, 0))
    for wrong in ({"kind": 4}, {"flags": 2}, {"flags": 1}, {"group": 2}, {"key_len": 0}, {"key_len": 41}, {"key_len": 5}):
        yield raw(copy_out(1, 0, **wrong))
    for wrong in ({"dram_slot": 8}, {"dram_slot": NO_SLOT}, {"ssd_slot": 20}, {"ssd_slot": NO_SLOT}, {"flags": 1}):
        yield raw(read(1, 0, 3) if "flags" not in wrong else read(1, 0, 3, **wrong), write(1, 0, 3, **wrong))
    padded = copy_out(1, 0)
    padded["key"][0, 39] = 1
    yield raw(padded)
    pair = load(1, 3, 0, dram=2)
    pair["dram_slot"][1] = 3
    yield raw(pair)
    yield raw(read(1, 2, 3, flags=1), write(1, 2, 3))
    yield raw(read(1, 2, 3, flags=1), read(1, 2, 3, flags=1), copy_in(1, 2))


def journal() -> Iterator[bytes]:
    every_sum = store_journal.SUM_HEADER | store_journal.SUM_RECORDS | store_journal.NUMBER_RECORDS
    put = Record(Kind.PUT, b"a" * 36, 3, 5, 0)
    other = Record(Kind.PUT, b"b" * 40, 4, 2**64 - 1, 65535)
    for flags in (0, every_sum):
        for epoch in (0, 3, 2**24 - 2, 2**24 - 1, 2**64 - 1):
            header = bytes([flags]) + encode_header(epoch, store_journal.FINGERPRINT)
            for records in (
                [put, other, Record(Kind.TOUCH, put.key), Record(Kind.DELETE, other.key)],
                [put, Record(Kind.CLEAR), other],
                [put, Record(Kind.PUT, other.key, put.slot), Record(Kind.PUT, put.key, 4)],
                [put._replace(key=b""), other._replace(slot=store_journal.SLOTS), put._replace(slot=NO_SLOT)],
            ):
                yield header + b"".join(encode_records(records, 1))
        header = bytes([flags]) + encode_header(3, store_journal.FINGERPRINT)
        record = b"".join(encode_records([put], 1))
        for at, value in ((22, 0), (22, 5), (23, 41), (23, 0), (71, 1)):
            yield header + record[:at] + bytes([value]) + record[at + 1 :] + record
        for at in range(0, 64, 8):
            yield header[: at + 1] + bytes([header[at + 1] ^ 2]) + header[at + 2 :] + record


def manifest() -> Iterator[bytes]:
    right = dict(zip(store_manifest.FIELDS, ("kvoffload", 1, 0, ["/a", "/b"], 9, 123456, "2026"), strict=True))
    yield bytes([store_manifest.AS_IT_IS]) + json.dumps(right).encode()
    for text in (b"", b"{", b"[]", b"null", b"\xff" * 500, b"\xff\xfe{\0", b"[" * 4000):
        yield bytes([store_manifest.AS_IT_IS]) + text
    values = store_manifest.VALUES
    chosen = [values.index(value) for value in ('"kvoffload"', "1", "0", '["/a", "/b"]', "8", "8", '"2026-01-01"')]
    for field in range(len(chosen)):
        for value in range(len(values)):
            yield bytes([1, *chosen[:field], value, *chosen[field + 1 :]])


def store_superblock() -> Iterator[bytes]:
    for flags in range(8):
        for at in (*SUPERBLOCK_FIELDS_AT, 64, 4095, 4096):
            yield bytes([flags]) + bytes(at) + b"\1"
            yield bytes([flags]) + bytes(at + 1)


SEEDS = {
    "engine_slot": engine_slot,
    "engine_superblock": engine_superblock,
    "engine_submit": engine_submit,
    "store_journal": journal,
    "store_manifest": manifest,
    "store_superblock": store_superblock,
}
