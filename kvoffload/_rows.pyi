from collections.abc import Buffer

def checksums(rows: Buffer, row_bytes: int, begin: int, end: int, seed: int, sums: Buffer, /) -> None:
    """XXH3-64 of the bytes `begin` to `end` of each row, into `sums`: as many u64. ValueError if the sizes do not fit."""

class KeyMap:
    """Which row of a table holds which block key: a table's columns are arrays by row, and this is its key column.

    Each key is in one row, and a row has one key. Memory of a row, filled or not: 1 byte more than the longest key, and 11 to 22
    for buckets. One thread at a time (the GIL is held throughout).
    """

    def __new__(cls, row_count: int, key_bytes: int) -> KeyMap:
        """Empty, for rows 0 .. row_count-1 and keys of 1 to `key_bytes` bytes. ValueError above 2**30 rows or 255 bytes,
        MemoryError."""

    def get(self, key: bytes, /) -> int | None:
        """The key's row."""

    def put(self, key: bytes, row: int, /) -> None:
        """ValueError if the key is there, the row has a key, or it is no key; IndexError if there is no such row."""

    def pop(self, key: bytes, /) -> int | None:
        """The row that the key had, which is empty now."""

    def key(self, row: int, /) -> bytes:
        """The row's key; b"" if it is empty. IndexError if there is no such row."""

    def fill(self, keys: Buffer, rows: Buffer, /) -> None:
        """`put` for each of many, until one raises. `keys`: of each its length, the key, zeros (types.KEY_ROW); `rows`: as
        many u32."""

    def __contains__(self, key: bytes, /) -> bool: ...
    def __len__(self) -> int:
        """Rows that have a key."""

class AgeHeaps:
    """Some of the frames 0 .. frame_count-1, by level and within a level by when they were used last. All calls take the logarithm
    of the frames at most, `fill` their number. Memory: 5 bytes a frame, 16 to 32 for each that is there. One thread at a time (the
    GIL is held throughout).
    """

    def __new__(cls, frame_count: int) -> AgeHeaps:
        """Empty. ValueError above 2**30 frames, MemoryError."""

    def put(self, frame: int, used: int, level: int, /) -> None:
        """The frame is there from now on, or is there with another time or level. IndexError if there is no such frame, or level:
        there are 256. MemoryError."""

    def drop(self, frame: int, /) -> None:
        """The frame is not there any more. Nothing if it was not. IndexError if there is no such frame."""

    def least(self, worths: Buffer, half_life: float, /) -> int | None:
        """The frame of which `worths[level] + used / half_life` is least, of the same age the first; it stays. None if there is
        none. `worths`: 256 f64, or ValueError."""

    def fill(self, frames: Buffer, used: Buffer, /) -> None:
        """`put` at level 0 for each of many: i64, i64. ValueError if they do not fit or any is there."""

    def __contains__(self, frame: int, /) -> bool:
        """IndexError if there is no such frame."""

    def __len__(self) -> int:
        """How many are there."""
