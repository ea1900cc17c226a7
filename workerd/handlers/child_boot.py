"""Starts `child.py` in the application's interpreter, Python 3.8 or later.

    INTERPRETER child_boot.py MODULE:FUNCTION LEVEL
    INTERPRETER child_boot.py --check MODULE:FUNCTION

Python compiles the program that it is given, each time anew. What that imports it reads as
bytecode, where there is some for this interpreter: that is faster, and saves each process memory.
"""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

FOLDER = os.path.dirname(os.path.abspath(__file__))


def child() -> ModuleType:
    """The module, by its path: nothing else of workerd can be imported."""
    path = os.path.join(FOLDER, "child.py")
    spec = spec_from_file_location("workerd.handlers.child", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # Where this file is, modules have names that an application may use as well.
    if sys.path and os.path.abspath(sys.path[0]) == FOLDER:
        del sys.path[0]
    sys.path.insert(0, os.getcwd())
    child().main(sys.argv[1:])
