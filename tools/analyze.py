"""Warnings of two compilers and clang's static analysers on all C here, the tests' included; any finding is an error.
Run by `make analyze`, which installs what it needs.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [file for folder in ("csrc", "tests/engine", "tests/fuzz") for file in sorted((ROOT / folder).rglob("*.c"))]
DIALECT = (
    *("-std=gnu11", "-pthread", "-DPy_LIMITED_API=0x030B0000", "-DKVO_HAVE_LIBURING=1", "-DFAKE_VERSION=13000"),
    *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'build' / 'include'}", f"-I{sysconfig.get_path('include')}"),
)
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
CHECKERS = ("core", "unix", "deadcode", "security", "nullability")
NOT_CHECKERS = {
    "security.insecureAPI.DeprecatedOrUnsafeBufferHandling": "wants memcpy_s and the like, which glibc does not have",
}
TIDY = ("bugprone-*", "cert-*")
NOT_TIDY = {
    "bugprone-easily-swappable-parameters": "every function of two numbers, whatever they are called",
    "bugprone-reserved-identifier": "_GNU_SOURCE, which is there to be defined",
    "cert-dcl37-c": "the same",
    "cert-dcl51-cpp": "the same",
    "bugprone-suspicious-include": "fake_cuda_memory.c is fake_cuda.c and more",
    "cert-err33-c": "wants snprintf, fprintf and fclose looked at where a cut text or a lost line is all that can follow",
    "cert-err34-c": "sscanf of /proc/self/smaps: the kernel's numbers fit",
}


def commands(file: Path) -> list[list[str]]:
    analyser = [word for name in CHECKERS for word in ("-Xclang", f"-analyzer-checker={name}")]
    analyser += [word for name in NOT_CHECKERS for word in ("-Xclang", f"-analyzer-disable-checker={name}")]
    checks = ",".join(["-*", *TIDY, *(f"-{name}" for name in NOT_TIDY)])
    return [
        ["cc", *DIALECT, *WARNINGS, "-O2", "-c", "-o", "/dev/null", str(file)],
        ["clang", *DIALECT, *WARNINGS, "-fsyntax-only", str(file)],
        ["clang", *DIALECT, "--analyze", *analyser, "-Xclang", "-analyzer-werror", "-Xclang", "-analyzer-output=text", str(file)],
        ["clang-tidy", "--quiet", f"--checks={checks}", "--warnings-as-errors=*", str(file), "--", *DIALECT],
    ]


def main() -> None:
    failed = False
    for file in SOURCES:
        for command in commands(file):
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
            if done.returncode != 0:
                failed = True
                print(f"{command[0]} on {file.relative_to(ROOT)}:\n{done.stdout}{done.stderr}", flush=True)
    print(f"{len(SOURCES)} files: {'findings, see above' if failed else 'nothing found'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
