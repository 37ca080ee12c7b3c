"""Compiles the engine's fuzz targets: to be run through replay.c by any C compiler, or as fuzzers by clang."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TARGETS = sorted(file.stem for file in HERE.glob("engine_*.c"))
SOURCES = [file for file in sorted((ROOT / "csrc").glob("*.c")) if file.name != "module.c"]  # that one needs Python
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
INCLUDES = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'build' / 'include'}")


def compile_all(compiler: str, flags: tuple[str, ...], folder: Path, sources: list[Path]) -> list[Path]:
    """Object files. Without liburing: what is fuzzed lies above the seam to the drives."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=gnu11", "-O1", "-g", "-pthread", *WARNINGS, *INCLUDES, *flags, "-c", *map(str, sources)]
    subprocess.run(command, check=True, cwd=folder)
    return [folder / f"{source.stem}.o" for source in sources]


def link(compiler: str, flags: tuple[str, ...], program: Path, objects: list[Path]) -> Path:
    command = [compiler, *flags, "-pthread", "-o", str(program), *map(str, objects), "-ldl"]
    subprocess.run(command, check=True)
    return program


def build_replays(folder: Path, flags: tuple[str, ...] = ()) -> dict[str, Path]:
    """Each target as a program that takes files."""
    compiler = os.environ.get("CC", "cc")
    *engine, replay = compile_all(compiler, flags, folder, [*SOURCES, HERE / "replay.c"])
    objects = dict(zip(TARGETS, compile_all(compiler, flags, folder, [HERE / f"{name}.c" for name in TARGETS]), strict=True))
    return {name: link(compiler, flags, folder / name, [*engine, replay, own]) for name, own in objects.items()}


def build_fuzzer(name: str, folder: Path, flags: tuple[str, ...]) -> Path:
    """One target as a libFuzzer program."""
    objects = compile_all("clang", ("-fsanitize=fuzzer-no-link", *flags), folder, [*SOURCES, HERE / f"{name}.c"])
    return link("clang", ("-fsanitize=fuzzer", *flags), folder / name, objects)
