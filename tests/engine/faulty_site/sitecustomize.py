"""On PYTHONPATH, gives the engine of a process and of its children faulty drives and copies; see faulty.py."""

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec


class FaultyCore(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "kvoffload.engine._core":
            return None
        return importlib.util.spec_from_file_location(name, os.environ["KVO_FAULTY_CORE"])


sys.meta_path.insert(0, FaultyCore())
