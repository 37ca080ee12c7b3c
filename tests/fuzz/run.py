"""Fuzz every reader of what lies on disk, and the engine's taking of operations: `make fuzz`. FUZZ_SECONDS for each target
(600), `make fuzz TARGETS=engine_slot` for some. Needs clang and Atheris, which `make fuzz` installs.

What was new is added to tests/fuzz/corpus, which `make test` replays without a fuzzer. An input that breaks a promise stays in
build/fuzz/<target>/; with its fix it belongs into the corpus.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.build import HERE, ROOT, TARGETS, build_fuzzer
from tests.fuzz.seeds import SEEDS

CORPUS = HERE / "corpus"
WORK = ROOT / "build" / "fuzz"
STORE_TARGETS = sorted(file.stem for file in HERE.glob("store_*.py"))
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
MEMORY = Path("/dev/shm")
INPUT_BYTES_MAX = 4096
INPUT_SECONDS_MAX = 60
PIECE_SECONDS = 120  # then a new process: Atheris loses a kilobyte of its own with every input
FINDINGS = "crash-*", "leak-*", "timeout-*", "oom-*"


def command_of(name: str, folder: Path) -> list[str]:
    """Runs the target; libFuzzer's arguments are to follow."""
    if name in STORE_TARGETS:
        return [sys.executable, "-m", "tests.fuzz.fuzz_store", name]
    return [str(build_fuzzer(name, folder, SANITIZERS))]


def run(command: list[object], log: Path) -> str:
    """What it printed, which goes to the log as well."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder, log.open("w") as file:
        environment = os.environ | {"UBSAN_OPTIONS": "print_stacktrace=1", "TMPDIR": folder}
        subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, stdout=file, stderr=file, check=False)
    return log.read_text(errors="replace")


def write_seeds(name: str, folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    files = []
    for number, seed in enumerate(SEEDS[name]()):
        files.append(folder / f"{number:03}")
        files[-1].write_bytes(seed)
    return files


def keep_what_is_needed(fuzzer: list[str], found: Path, corpus: Path) -> None:
    """Makes of the old corpus and what was found the smallest corpus that reaches the same code."""
    merged = found.with_name("merged")
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    run([*fuzzer, "-set_cover_merge=1", "-use_counters=0", merged, corpus, found], found.with_name("merge.log"))
    if any(merged.iterdir()):
        shutil.rmtree(corpus)
        shutil.copytree(merged, corpus)


def fuzz(name: str, seconds: int) -> bool:
    """False if a promise was broken."""
    folder, corpus = WORK / name, CORPUS / name
    found, seeds = folder / "found", folder / "seeds"
    shutil.rmtree(folder, ignore_errors=True)
    found.mkdir(parents=True)
    corpus.mkdir(parents=True, exist_ok=True)
    write_seeds(name, seeds)
    fuzzer = command_of(name, folder)
    limits = (f"-max_len={INPUT_BYTES_MAX}", f"-timeout={INPUT_SECONDS_MAX}", "-print_final_stats=1")
    inputs = edges = 0
    for begun in range(0, seconds, PIECE_SECONDS):
        time = f"-max_total_time={min(PIECE_SECONDS, seconds - begun)}"
        told = run([*fuzzer, time, *limits, f"-artifact_prefix={folder}/", found, corpus, seeds], folder / "log")
        findings = [str(file) for pattern in FINDINGS for file in folder.glob(pattern)]
        executed = re.search(r"stat::number_of_executed_units: (\d+)", told)
        if findings or executed is None:
            print(f"{name}: failed, see {folder / 'log'} {' '.join(findings)}", flush=True)
            return False
        inputs += int(executed[1])
        edges = int(re.findall(r"cov: (\d+)", told)[-1])
    keep_what_is_needed(fuzzer, found, corpus)
    kept = [file.stat().st_size for file in corpus.iterdir()]
    print(f"{name}: {inputs} inputs in {seconds} s reach {edges} edges; kept: {len(kept)} files, {sum(kept)} bytes", flush=True)
    return True


def main() -> None:
    seconds = int(os.environ.get("FUZZ_SECONDS", "600"))
    known = [*TARGETS, *STORE_TARGETS]
    chosen = sys.argv[1:] or known
    if unknown := set(chosen) - set(known):
        sys.exit(f"no fuzz target {' '.join(sorted(unknown))}: choose of {' '.join(known)}")
    kept_promises = [fuzz(name, seconds) for name in chosen]  # all are to run, whatever one finds
    sys.exit(not all(kept_promises))


if __name__ == "__main__":
    main()
