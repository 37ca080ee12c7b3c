"""Builds the C extensions: the engine, kvoffload.engine._core, and the index's tables, kvoffload._rows. Everything else is
in pyproject.toml.

They use Python's limited API: one build serves every Python from 3.11 on. Environment:
KVO_SANITIZE=address|thread builds with sanitisers; KVO_WITHOUT_LIBURING=1 builds without io_uring.
"""

import os
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
ENGINE = "kvoffload.engine._core"
LIBURING_CHECK = "#include <liburing.h>\nint check(void) { struct io_uring r; return io_uring_queue_init(8, &r, 0); }\n"
LIBURING_STATIC = ["-l:liburing.a", "-Wl,--exclude-libs,ALL"]
LIBURING_SHARED = ["-luring"]


class BuildEngine(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name == ENGINE:
            self.use_liburing(ext)
        super().build_extension(ext)

    def use_liburing(self, ext: Extension) -> None:
        link = None if os.environ.get("KVO_WITHOUT_LIBURING") else self.find_liburing()
        if link is None:
            print("engine: without io_uring (liburing.h not found or not wanted); file I/O will use threads")
        else:
            print(f"engine: with io_uring, linked by {' '.join(link)}")
            ext.define_macros.append(("KVO_HAVE_LIBURING", "1"))
            ext.extra_link_args += link

    def find_liburing(self) -> list[str] | None:
        """The flags that link liburing into a shared object, static if its code allows it; None if it is not there."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "check.c")
            source.write_text(LIBURING_CHECK)
            for link in (LIBURING_STATIC, LIBURING_SHARED):
                try:
                    objects = self.compiler.compile([str(source)], output_dir=folder)
                    self.compiler.link_shared_object(objects, str(Path(folder, "check.so")), extra_postargs=link)
                except (CompileError, LinkError):
                    continue
                return link
        return None


class LimitedApiWheel(bdist_wheel):
    def finalize_options(self) -> None:
        self.py_limited_api = "cp311"
        super().finalize_options()


sanitize = SANITIZERS[os.environ.get("KVO_SANITIZE", "")]


def extension(name: str, folder: Path, libraries: list[str]) -> Extension:
    return Extension(
        name,
        sources=sorted(str(path) for path in folder.glob("*.c")),
        depends=sorted(str(path) for path in folder.glob("*.h")),
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        extra_compile_args=["-std=gnu11", "-O3", "-g", "-fvisibility=hidden", "-pthread", *WARNINGS, *sanitize],
        extra_link_args=[*libraries, *sanitize],
        py_limited_api=True,
    )


setup(
    ext_modules=[
        extension(ENGINE, Path("csrc"), ["-pthread", "-ldl"]),
        extension("kvoffload._rows", Path("csrc", "rows"), []),
    ],
    cmdclass={"build_ext": BuildEngine, "bdist_wheel": LimitedApiWheel},
)
