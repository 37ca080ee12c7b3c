"""Any bytes as manifest.json: refused with a sentence, or numbers that the store can reckon with, which are the same when
written again. An input is a file's bytes, or a choice of a value for each field, for JSON is seldom hit by accident."""

import json
import os

from kvoffload.errors import StoreError
from kvoffload.store.directory import Directory
from kvoffload.store.namespace import MANIFEST, Identity, Manifest
from kvoffload.types import NO_SLOT
from tests.fuzz.promises import check_sentence, put_file

FIELDS = ("format", "format_version", "path_index", "paths", "slot_count", "reserved_bytes", "created")
VALUES = (
    '"kvoffload"', '"2026-01-01"', "0", "1", "8",
    '["/a", "/b"]', '["\\ud800"]', "[1, null]", "[]", "{}", "null", "true", "-1", "1.5", "1e400",
    "-1e400", "NaN", '"1"', '"x"', '""', "4294967294", "4294967295", str(2**63 - 1), str(2**64), "1e308", "9" * 4300, "9" * 4301,
    "-" + "9" * 4300, "[" * 2000 + "]" * 2000, '{"0": 1}', '"' + "y" * 3000 + '"',
)  # fmt: skip
AS_IT_IS = 0
IDENTITY = Identity.of({"model": "m"}, 4096, 1)


def manifest_of(data: bytes) -> bytes:
    choice, rest = data[:1], data[1:]
    if choice in (b"", bytes([AS_IT_IS])):
        return rest
    chosen = [f'"{field}": {VALUES[value % len(VALUES)]}' for field, value in zip(FIELDS, rest, strict=False)]
    return ("{" + ", ".join(chosen) + "}").encode()


def one_input(data: bytes, directory: Directory) -> None:
    put_file(os.path.join(directory.path, MANIFEST), manifest_of(data))
    try:
        found = Manifest.read(directory)
    except StoreError as error:
        check_sentence(error, directory.path)
        return
    assert found is not None
    assert 0 <= found.path_index < NO_SLOT
    assert 0 <= found.slot_count < NO_SLOT
    assert 0 <= found.reserved_bytes < 1 << 63
    json.dumps([found.paths, found.created]).encode()
    found.write(directory, IDENTITY)
    assert Manifest.read(directory) == found
