"""Any bytes in a slot file's place: the store refuses them with a sentence, or they are exactly the superblock it would make."""

import os
import struct

import xxhash

from kvoffload.errors import StoreError
from kvoffload.layout import SUPERBLOCK_BYTES
from kvoffload.store import slotfile
from kvoffload.store.directory import Directory
from kvoffload.store.slotfile import Superblock
from tests.fuzz.promises import check_sentence, put_file

RIGHT = Superblock(rank=1, ranks=2, path_index=0, path_count=3, payload_bytes=9000, fingerprint=b"fingerprint 16 b")
SUMMED_BYTES = 56
EDIT_A_RIGHT_ONE, SUM_AGAIN, CUT = 1, 2, 4


def file_of(data: bytes) -> bytes:
    flags, edits = data[0] if data else 0, data[1:]
    begun = RIGHT.encode() if flags & EDIT_A_RIGHT_ONE else bytes(SUPERBLOCK_BYTES)
    block = bytearray(begun)
    for at, edit in enumerate(edits[:SUPERBLOCK_BYTES]):
        block[at] ^= edit
    if flags & SUM_AGAIN:
        block[SUMMED_BYTES : SUMMED_BYTES + 8] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(block[:SUMMED_BYTES])))
    return bytes(block[: len(edits)] if flags & CUT else block) + edits[SUPERBLOCK_BYTES:]


def one_input(data: bytes, directory: Directory) -> None:
    file = file_of(data)
    put_file(os.path.join(directory.path, RIGHT.file_name), file)
    try:
        size = slotfile.check(directory, RIGHT)
    except StoreError as error:
        check_sentence(error, directory.path)
        assert file[:SUPERBLOCK_BYTES] != RIGHT.encode()
        return
    assert file[:SUPERBLOCK_BYTES] == RIGHT.encode()
    assert size == len(file)
