"""The public names and their signatures are those of public_api.txt, so that a change is seen.

To renew that file: python -m tests.test_public_api
"""

import importlib
import inspect
import re
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = Path(__file__).with_name("public_api.txt")
MODULES = (
    "logitstream",
    "logit_codec",
    "student_trainer",
    "student_trainer.hf_trainer",
    "student_trainer.errors",
    "student_trainer.data",
)
INDENT = "    "
OURS = ("logitstream", "logit_codec", "student_trainer")


def public_names(module: ModuleType) -> list[str]:
    """Those of `__all__`, or else what a module defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def signature_of(value: Any, indent: str = "") -> str:
    """Types without their modules; a parameter is a line where not all of them fit on one."""
    signature = inspect.signature(value)
    text = shorten(str(signature))
    if len(text) <= 80:
        return text
    lines: list[str] = []
    for parameter in signature.parameters.values():
        starred = any(line.startswith("*") for line in lines)
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
        lines.append(shorten(str(parameter)))
    returns = shorten(str(signature.replace(parameters=())))[2:]
    return "(\n" + "".join(f"{indent}    {line},\n" for line in lines) + f"{indent}){returns}"


def shorten(text: str) -> str:
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)| at 0x[0-9a-f]+", "", text)


def is_ours(value: Any) -> bool:
    return value.__module__.partition(".")[0] in OURS


def describe_class(cls: type[Any]) -> list[str]:
    """Its bases, how it is made, and the public members that it defines itself."""
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    lines = [f"class {cls.__name__}({bases})"]
    makers = [base for base in cls.__mro__ if {"__init__", "__new__"} & {*vars(base)}]
    if makers and is_ours(makers[0]):
        lines.append(f"{INDENT}{cls.__name__}{signature_of(cls, INDENT)}")
    for name, member in sorted(vars(cls).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, staticmethod | classmethod):
            member = getattr(cls, name)
        if callable(member):
            lines.append(f"{INDENT}.{name}{signature_of(member, INDENT)}")
        elif isinstance(member, property | cached_property):
            lines.append(f"{INDENT}.{name}: property")
    return lines


def has(module_name: str, name: str, value: Any) -> bool:
    module = importlib.import_module(module_name)
    return name in public_names(module) and getattr(module, name) is value


def describe(module_name: str) -> list[str]:
    module = importlib.import_module(module_name)
    lines = [f"[{module_name}]"]
    for name in public_names(module):
        value = getattr(module, name)
        others = [other for other in MODULES if other != module_name and has(other, name, value)]
        if module_name == "logitstream" or "student_trainer.errors" in others:
            lines.append(f"{name}: of {others[-1]}")
        elif inspect.isclass(value):
            lines += describe_class(value)
        elif callable(value):
            lines.append(f"{name}{signature_of(value)}")
        else:
            lines.append(f"{name}: {type(value).__name__}")
    return [*lines, ""]


def public_api() -> str:
    return "\n".join(line for name in MODULES for line in describe(name))


def test_the_public_names_and_signatures_are_those_of_the_file():
    assert public_api() == FILE.read_text(), (
        "the public names or signatures changed. If that is wanted, renew the file with "
        "`python -m tests.test_public_api`, and say so in CHANGELOG.md"
    )


if __name__ == "__main__":
    FILE.write_text(public_api())
