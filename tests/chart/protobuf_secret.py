"""A Secret as Helm writes its releases: in protobuf, by the numbers of fields in Kubernetes' generated.proto files."""

import base64
from collections.abc import Iterator

MAGIC = b"k8s\x00"
ENVELOPE_RAW = 2  # of runtime.Unknown
METADATA, DATA, TYPE = 1, 2, 3  # of core/v1.Secret
NAME, NAMESPACE, LABELS = 1, 3, 11  # of meta/v1.ObjectMeta
KEY, VALUE = 1, 2  # of a map's entry
VARINT, BYTES = 0, 2  # how a field is written; no other way is met here


def secret(body: bytes) -> dict:
    assert body.startswith(MAGIC)
    raw = first(body[len(MAGIC) :], ENVELOPE_RAW)
    metadata = first(raw, METADATA)
    data = {first(entry, KEY).decode(): base64.b64encode(first(entry, VALUE)).decode() for entry in each(raw, DATA)}
    labels = {first(entry, KEY).decode(): first(entry, VALUE).decode() for entry in each(metadata, LABELS)}
    about = {"name": first(metadata, NAME).decode(), "namespace": first(metadata, NAMESPACE).decode(), "labels": labels}
    return {"metadata": about, "type": first(raw, TYPE).decode(), "data": data}


def first(message: bytes, number: int) -> bytes:
    return next(each(message, number))


def each(message: bytes, number: int) -> Iterator[bytes]:
    """What the field holds, once for each time that it is there."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        value, at = varint(message, at)
        if tag & 7 == BYTES:
            at += value
            if tag >> 3 == number:
                yield message[at - value : at]
        else:
            assert tag & 7 == VARINT, f"field {tag >> 3} is written in another way"


def varint(message: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; and where the next thing begins."""
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1
