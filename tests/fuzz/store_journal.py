"""Any bytes as index.journal: refused with a sentence, or an index that is within bounds and says the same when written again.

The first byte of an input tells which sums are made again over what follows, for no fuzzer guesses one."""

import os
import struct

import xxhash

from kvoffload.errors import StoreError
from kvoffload.store import journal
from kvoffload.store.directory import Directory
from kvoffload.types import KEY_BYTES_MAX
from tests.fuzz.promises import check_sentence, put_file

FINGERPRINT = b"fingerprint 16 b"
SLOTS = 100
SUM_HEADER, SUM_RECORDS, NUMBER_RECORDS = 1, 2, 4
GENERATIONS_PER_EPOCH = 1 << 40  # docs/format.md


def with_sum(fields: bytes) -> bytes:
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))


def journal_of(data: bytes) -> bytes:
    flags, data = data[0] if data else 0, data[1:]
    header, body = data[: journal.HEADER_BYTES], data[journal.HEADER_BYTES :]
    if flags & SUM_HEADER and len(header) == journal.HEADER_BYTES:
        header = with_sum(header[:-8])
    records = [body[at : at + journal.RECORD_BYTES] for at in range(0, len(body), journal.RECORD_BYTES)]
    for number, record in enumerate(records, 1):
        if len(record) == journal.RECORD_BYTES:
            if flags & NUMBER_RECORDS:
                record = struct.pack("<Q", number) + record[8:]
            records[number - 1] = with_sum(record[:-8]) if flags & SUM_RECORDS else record
    return header + b"".join(records)


def one_input(data: bytes, directory: Directory) -> None:
    put_file(os.path.join(directory.path, journal.NAME), journal_of(data))
    try:
        loaded = journal.load(directory, FINGERPRINT, SLOTS)
    except StoreError as error:
        check_sentence(error, directory.path)
        return
    assert loaded is not None
    table = loaded.blocks.below(SLOTS)
    entries = list(table)
    for entry in entries:
        assert 1 <= len(entry.key) <= KEY_BYTES_MAX
        assert 0 <= entry.slot < SLOTS
        assert 0 <= entry.generation < 1 << 64
        assert 0 <= entry.group < 1 << 16
    assert len(table) == len(entries) == len({entry.slot for entry in entries}) == len({entry.key for entry in entries})
    again = b"".join(journal.encode_records(journal.puts(table), 1))
    replayed, _, used_bytes, skipped = journal.replay(again)
    assert (list(replayed), used_bytes, skipped) == (entries, len(again), 0)
    assert 0 <= loaded.epoch and (loaded.epoch + 2) * GENERATIONS_PER_EPOCH <= 1 << 64, "the next life has generations"
    journal.encode_header(loaded.epoch + 1, FINGERPRINT)
