"""What bench_gpu uses of torch, on the device of fake_cuda.c, which must be loaded. Products take a millisecond."""

import contextlib
import ctypes
import time
import types
from collections.abc import Iterator

PRODUCT_US = 1000
bfloat16 = "bfloat16"

_fake = ctypes.CDLL("libcuda.so.1")
_fake.fake_stream.restype = ctypes.c_void_p
_fake.fake_kernel.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int]
_one = ctypes.create_string_buffer(b"1", 1)
_current: int | None = None  # the default stream


def _put(target: ctypes.Array, delay_us: int) -> None:
    _fake.fake_kernel(_current, target, _one, 1, delay_us, False)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.done = ctypes.create_string_buffer(1)

    def record(self) -> None:
        _put(self.done, 0)

    def synchronize(self) -> None:
        while self.done.raw != b"1":
            time.sleep(0.001)

    def elapsed_time(self, _end: "Event") -> float:
        return PRODUCT_US / 1000


@contextlib.contextmanager
def _stream(stream: int) -> Iterator[None]:
    global _current
    before, _current = _current, stream
    yield
    _current = before


def randn(*_shape: int, device: str, dtype: str) -> ctypes.Array:
    assert (device, dtype) == ("cuda:0", bfloat16)
    return ctypes.create_string_buffer(1)


def empty_like(_other: ctypes.Array) -> ctypes.Array:
    return ctypes.create_string_buffer(1)


def matmul(_left: ctypes.Array, _right: ctypes.Array, out: ctypes.Array) -> None:
    assert _current is not None, "copies would wait for this product"
    _put(out, PRODUCT_US)


cuda = types.SimpleNamespace(Event=Event, Stream=lambda _device: _fake.fake_stream(), stream=_stream, is_available=lambda: True)
