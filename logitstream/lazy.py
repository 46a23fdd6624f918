"""Loads the public names of a package when they are first used.

torch takes seconds to import, and a command line that is wrong or asks for help needs none of it.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from logitstream.extras import explain


def attach(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` for a package.

    homes: maps each public name to its module. Where an extra is not installed, the first use of a
    name that needs it raises an ImportError that says how to install it.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(homes[name]), name)
        except ImportError as error:
            line = explain(error, "train")
            if line is None:
                raise
            raise ImportError(f"{name}: {line}", name=error.name, path=error.path) from error
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, list_names
