"""The test's side of fake_cuda.c."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np

from tests.engine.world import KVCache
from tests.sanitizers import FLAGS


def compile_shared(library: Path, *arguments: object) -> Path:
    command = ["cc", "-shared", "-fPIC", "-O1", "-g", "-pthread", *FLAGS, "-o", library, *arguments]
    subprocess.run([str(word) for word in command], check=True)
    return library


def compile_fake(library: Path, source: str, version: int) -> Path:
    """A libcuda.so.1: a process that has loaded it finds it under that name. `source`: a file beside this one."""
    options = (f"-DFAKE_VERSION={version}", "-Wl,-soname,libcuda.so.1", "-Wall", "-Werror")
    return compile_shared(library, *options, Path(__file__).with_name(source))


class Device:
    """The fake library, loaded under the name by which the engine asks for it. Its variables are attributes:
    device.fake_delay_us = 100."""

    LONG = ("fake_register_limit",)

    def __init__(self, library: str, seed: int = 0) -> None:
        fake = ctypes.CDLL(library)
        fake.fake_stream.restype = ctypes.c_void_p
        fake.fake_kernel.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int]
        fake.fake_device_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        object.__setattr__(self, "library", fake)
        self.fake_seed = seed

    def variable(self, name: str) -> ctypes.c_int | ctypes.c_uint64:
        return (ctypes.c_uint64 if name in self.LONG else ctypes.c_int).in_dll(self.library, name)

    def __setattr__(self, name: str, value: int) -> None:
        self.variable(name).value = value

    def __getattr__(self, name: str) -> int:
        return self.variable(name).value

    def holds(self, kv: KVCache) -> None:
        """The KV cache is in this device's memory from now on."""
        for group in kv.arrays:
            for array in group:
                self.library.fake_device_memory(array.ctypes.data, array.nbytes)

    def fail(self, call: str, nth: int = 1, forever: bool = False, code: int = 719) -> None:
        self.library.fake_fail(call.encode(), nth, forever, code)

    def calls(self, name: str | None = None) -> int:
        return self.library.fake_calls(name and name.encode())

    def lose(self, is_lost: bool = True) -> None:
        self.library.fake_lose(is_lost)

    def forget(self) -> None:
        self.library.fake_forget()

    def stream(self) -> int:
        return self.library.fake_stream()

    def depth(self) -> int:
        return self.library.fake_depth()

    def write(self, stream: int, to: np.ndarray, value: np.ndarray, delay_us: int) -> None:
        """A kernel that writes `value`; `to` are bytes of the KV cache."""
        self.library.fake_kernel(stream, to.ctypes.data, value.ctypes.data, to.nbytes, delay_us, True)

    def read(self, stream: int, at: np.ndarray, into: np.ndarray, delay_us: int) -> None:
        """A kernel that reads bytes of the KV cache when its time has come."""
        self.library.fake_kernel(stream, into.ctypes.data, at.ctypes.data, at.nbytes, delay_us, False)

    def alive(self) -> tuple[int, ...]:
        """What the engine has and must give back: streams, events, registrations, contexts."""
        return self.fake_streams, self.fake_events, self.fake_registrations, self.fake_contexts
