"""Checksums of many rows are those that xxHash has of each."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvoffload._rows import checksums


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(0, 20), st.randoms())
def test_they_are_xxhashs(row_bytes, begin, end, seed, count, generator):
    begin, end = sorted((min(begin, row_bytes), min(end, row_bytes)))
    rows = generator.randbytes(row_bytes * count)
    sums = np.zeros(count, np.uint64)
    checksums(rows, row_bytes, begin, end, seed, sums)
    cut = [rows[at + begin : at + end] for at in range(0, len(rows), row_bytes)]
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(row, seed) for row in cut]


@pytest.mark.parametrize(
    ("row_bytes", "begin", "end", "count"), [(72, 0, 73, 1), (72, 9, 8, 1), (72, 0, 64, 2), (72, 0, 64, 0), (71, 0, 64, 1)]
)
def test_sizes_that_do_not_fit_are_refused(row_bytes, begin, end, count):
    with pytest.raises(ValueError, match="expected as many rows"):
        checksums(bytes(72), row_bytes, begin, end, 0, np.zeros(count, np.uint64))


def test_sums_must_be_writable():
    with pytest.raises((TypeError, BufferError, ValueError)):
        checksums(bytes(72), 72, 0, 64, 0, bytes(8))
