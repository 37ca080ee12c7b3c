"""One of the store's fuzz targets under Atheris: `python -m tests.fuzz.fuzz_store <target> <arguments for libFuzzer>`."""

import importlib
import logging
import sys
import tempfile

import atheris


def main() -> None:
    name = sys.argv.pop(1)
    logging.disable()  # thousands of damaged journals a second are no news
    with atheris.instrument_imports(include=["kvoffload", "tests.fuzz", "json"]):
        target = importlib.import_module(f"tests.fuzz.{name}")
        directory = importlib.import_module("kvoffload.store.directory")
    with tempfile.TemporaryDirectory() as folder:
        opened = directory.Directory.open(folder)
        # Merging starts this anew, by what it takes for the program's name.
        program = f"{sys.executable} -m tests.fuzz.fuzz_store {name}"
        atheris.Setup([program, *sys.argv[1:]], lambda data: target.one_input(data, opened))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
