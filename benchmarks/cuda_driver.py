"""The few calls of the CUDA driver that a benchmark or test makes itself, by ctypes: no toolkit and no torch needed."""

import ctypes
import importlib.util
from typing import Self

import numpy as np

PINNED_PORTABLE = 1


class Cuda:
    """One device's primary context, current on the thread that opened it. Raises OSError without a driver or device."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self._library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._device = device.value
        name, version = ctypes.create_string_buffer(256), ctypes.c_int()
        self.call("cuDeviceGetName", name, 256, self._device)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.name, self.driver = name.value.decode(), f"{version.value // 1000}.{version.value % 1000 // 10}"
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.call("cuCtxPushCurrent_v2", context)

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise OSError(f"{name} failed with CUDA error {status}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        self.call("cuDevicePrimaryCtxRelease_v2", self._device)

    def alloc(self, nbytes: int) -> int:
        """The address of `nbytes` of GPU memory."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, data: np.ndarray) -> None:
        source = ctypes.c_void_p(data.ctypes.data)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(data.nbytes))

    def read(self, address: int, nbytes: int) -> np.ndarray:
        data = np.empty(nbytes, np.uint8)
        target = ctypes.c_void_p(data.ctypes.data)
        self.call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
        return data

    def pinned(self, nbytes: int) -> "Pinned":
        return Pinned(self, nbytes)

    def has_torch(self) -> bool:
        if importlib.util.find_spec("torch") is None:
            return False
        import torch

        return torch.cuda.is_available()


class Pinned:
    """Pinned host memory and a stream: copies of all of it, waited for."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self._cuda, self.nbytes = cuda, nbytes
        self._memory, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        cuda.call("cuMemHostAlloc", ctypes.byref(self._memory), ctypes.c_size_t(nbytes), PINNED_PORTABLE)
        cuda.call("cuStreamCreate", ctypes.byref(self._stream), 1)

    def copy_from(self, address: int) -> None:
        size = ctypes.c_size_t(self.nbytes)
        self._cuda.call("cuMemcpyDtoHAsync_v2", self._memory, ctypes.c_uint64(address), size, self._stream)
        self._cuda.call("cuStreamSynchronize", self._stream)

    def copy_to(self, address: int) -> None:
        size = ctypes.c_size_t(self.nbytes)
        self._cuda.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), self._memory, size, self._stream)
        self._cuda.call("cuStreamSynchronize", self._stream)

    def free(self) -> None:
        self._cuda.call("cuStreamDestroy_v2", self._stream)
        self._cuda.call("cuMemFreeHost", self._memory)
