"""The key column against a dict, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvoffload._rows import KeyMap
from kvoffload.types import KEY_BYTES_MAX, KEY_ROW, key_of_row, key_row

# Few and short, so that buckets run over into one another; and some that differ only in length or in zeros at the end.
KEYS = [bytes([number]) for number in range(40)] + [b"\0" * length for length in range(2, 12)] + [b"a", b"a\0", b"a" * 40]


def columns(pairs):
    keys = np.frombuffer(b"".join(key_row(key) for key, _ in pairs), KEY_ROW)
    return keys, np.array([row for _, row in pairs], np.uint32)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.rows = 1
        self.map = KeyMap(1, KEY_BYTES_MAX)
        self.model: dict[bytes, int] = {}

    @initialize(rows=st.integers(1, 24), keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=24), order=st.randoms())
    def fill(self, rows, keys, order):
        self.rows = rows
        self.map = KeyMap(rows, KEY_BYTES_MAX)
        self.model = dict(zip(keys, order.sample(range(rows), rows), strict=False))
        self.map.fill(*columns(list(self.model.items())))

    @rule(key=st.sampled_from(KEYS), row=st.integers(0, 23))
    def put(self, key, row):
        if row < self.rows and key not in self.model and row not in self.model.values():
            self.map.put(key, row)
            self.model[key] = row
            return
        with pytest.raises(IndexError if row >= self.rows else ValueError):
            self.map.put(key, row)

    @rule(key=st.sampled_from(KEYS))
    def pop(self, key):
        assert self.map.pop(key) == self.model.pop(key, None)

    @invariant()
    def it_is_the_dict(self):
        assert len(self.map) == len(self.model)
        for key in KEYS:
            assert self.map.get(key) == self.model.get(key)
            assert (key in self.map) == (key in self.model)
        by_row = {row: key for key, row in self.model.items()}
        assert [self.map.key(row) for row in range(self.rows)] == [by_row.get(row, b"") for row in range(self.rows)]


def test_it_says_what_a_dict_would():
    run_state_machine_as_test(Machine, settings=settings(max_examples=150, stateful_step_count=60, print_blob=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 96, 97, 1000, 3072])
def test_every_row_can_be_full_and_emptied_again_in_any_order(rows):
    """Sizes at which buckets are as full as they get, and just over."""
    keys = [number.to_bytes(36, "big") for number in range(rows)]
    found = KeyMap(rows, 36)
    for row, key in enumerate(keys):
        found.put(key, row)
    assert [found.get(key) for key in keys] == list(range(rows))
    assert found.get(b"another") is None
    for key in sorted(keys, key=lambda key: key[::-1]):
        row = found.pop(key)
        assert key == keys[row] and found.get(key) is None
    assert len(found) == 0 and not any(found.key(row) for row in range(rows))


@given(st.lists(st.binary(min_size=1, max_size=KEY_BYTES_MAX)))
def test_a_key_comes_back_out_of_its_row(keys):
    assert [key_of_row(row) for row in columns([(key, 0) for key in keys])[0].tolist()] == keys


def test_a_map_without_rows_has_no_keys_and_takes_none():
    found = KeyMap(0, 8)
    assert found.get(b"a") is None and found.pop(b"a") is None and len(found) == 0
    with pytest.raises(IndexError):
        found.put(b"a", 0)


@pytest.mark.parametrize("key", [b"", b"k" * 9, b"k" * 256, b"k" * 100_000])
def test_what_is_no_key_is_not_there_and_is_not_taken(key):
    found = KeyMap(4, 8)
    found.put(b"k" * 8, 0)
    assert found.get(key) is None and key not in found and found.pop(key) is None
    with pytest.raises(ValueError, match="1 to 8 bytes"):
        found.put(key, 1)
    assert len(found) == 1


@pytest.mark.parametrize("key", ["text", 7, None, [1]])
def test_keys_are_bytes(key):
    found = KeyMap(4, 8)
    for call in (found.get, found.pop, found.__contains__, lambda key: found.put(key, 0)):
        with pytest.raises(TypeError):
            call(key)


def test_a_length_that_is_none_is_refused_without_a_look_behind_the_column():
    """Keys that come are looked at before their turn."""
    keys = bytearray(b"".join(key_row(bytes([number])) for number in range(32)))
    keys[-KEY_ROW.itemsize] = 255
    with pytest.raises(ValueError, match="1 to 40 bytes, not 255"):
        KeyMap(32, KEY_BYTES_MAX).fill(bytes(keys), np.arange(32, dtype=np.uint32))


def test_rows_need_not_be_aligned():
    keys, rows = columns([(b"a", 5), (b"b", 3)])
    found = KeyMap(8, KEY_BYTES_MAX)
    found.fill(keys, memoryview(b"x" + rows.tobytes())[1:])
    assert (found.get(b"a"), found.get(b"b")) == (5, 3)


@pytest.mark.parametrize("row", [1 << 64, -1])
def test_what_is_no_64_bit_number_is_no_row(row):
    with pytest.raises(OverflowError):
        KeyMap(8, 8).put(b"a", row)


@pytest.mark.parametrize("row", [4, 1 << 31, (1 << 32) + 1, (1 << 64) - 1])
def test_there_are_no_rows_behind_the_last(row):
    found = KeyMap(4, 8)
    with pytest.raises(IndexError):
        found.put(b"a", row)
    with pytest.raises(IndexError):
        found.key(row)


@pytest.mark.parametrize(
    ("rows", "key_bytes"), [((1 << 30) + 1, 8), (1 << 63, 8), ((1 << 64) + 8, 8), (-1, 8), (4, 0), (4, -1), (4, 256)]
)
def test_sizes_out_of_range_are_refused(rows, key_bytes):
    with pytest.raises((ValueError, OverflowError)):
        KeyMap(rows, key_bytes)


def test_memory_that_cannot_be_had_is_an_error():
    with pytest.raises(MemoryError):
        for _ in range(4096):  # of 280 GB of addresses: 47 bits of them are soon used up
            KEEP.append(KeyMap(1 << 30, 255))
    KEEP.clear()


KEEP: list[KeyMap] = []


def test_columns_that_do_not_fit_are_refused():
    keys, rows = columns([(b"a", 0), (b"b", 1)])
    found = KeyMap(4, KEY_BYTES_MAX)
    for bad_keys, bad_rows in (
        (keys[:1], rows),
        (keys, rows[:1]),
        (keys, rows.view(np.uint8)[:7]),
        (keys.view(np.uint8)[:-1], rows),
    ):
        with pytest.raises(ValueError, match="not 41 for each"):
            found.fill(bad_keys, bad_rows)
    with pytest.raises(ValueError, match="there already"):
        found.fill(*columns([(b"a", 0), (b"a", 1)]))
    with pytest.raises(IndexError):
        found.fill(*columns([(b"c", 4)]))
    with pytest.raises(ValueError, match="1 to 40 bytes"):
        found.fill(np.full(1, 41, np.uint8).tobytes() + bytes(40), rows[:1])
