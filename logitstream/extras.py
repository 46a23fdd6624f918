"""Says which package is not installed, and the command that installs it.

Programs are started by `run`, which imports them: a missing package is one line, not a traceback.
"""

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from urllib.parse import unquote, urlsplit

PACKAGE = "logitstream"
OTHER_MODULES = {
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "protobuf": "google",
    "pyyaml": "yaml",
}
"""Modules of distributions whose module has another name."""


def run(program: str, module: str, extra: str, argv: Sequence[str] | None = None) -> int:
    """Imports a program's `main` from `module` and runs it; returns its exit code.

    extra: the extra with what the program needs.
    """
    try:
        return importlib.import_module(module).main(argv)
    except ImportError as error:
        line = explain(error, extra)
        if line is None:
            raise
        print(f"{program}: {line}", file=sys.stderr)
        return 1


def explain(error: ImportError, extra: str) -> str | None:
    """Explains a missing module in one line; None if it is not one that this package requires.

    extra: the one to name where several bring the module.
    """
    module = (error.name or "").partition(".")[0]
    # A Ray without its Serve misses modules that only Serve needs, and says so.
    having = [extra] if "ray[serve]" in str(error) else _extras_with(module)
    if not module or having == []:
        return None
    if having == [""]:
        return f"{module} is not installed; to install it: {install_command()}"
    named = extra if having is None or extra in having else having[0]
    return f"{module} is not installed; it comes with the extra [{named}]: {install_command(named)}"


def check_installed(extra: str, *modules: str) -> None:
    """Raises ValueError for the first of these modules of an extra that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            explained = explain(ModuleNotFoundError(name=module), extra)
            # An installation from before the extra was declared knows nothing of it.
            raise ValueError(
                explained
                or f"{module} is not installed; to install it: {sys.executable} -m pip install {module}"
            )


def install_command(extra: str = "") -> str:
    """Returns the command that installs this package again from its origin, with an extra."""
    options, where = "", PACKAGE
    try:
        origin = json.loads(distribution(PACKAGE).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # a clone that is only on the path
        root = Path(__file__).resolve().parents[1]
        origin = {"url": root.as_uri(), "dir_info": {"editable": True}}
    url = urlsplit(origin.get("url", ""))
    if url.scheme == "file":
        where = unquote(url.path)
        options = "-e " if origin.get("dir_info", {}).get("editable") else ""
    elif url.scheme:
        where, extra = f"{PACKAGE}{_in_brackets(extra)} @ {origin['url']}", ""
    return f"{sys.executable} -m pip install {options}'{where}{_in_brackets(extra)}'"


def _in_brackets(extra: str) -> str:
    return f"[{extra}]" if extra else ""


def _extras_with(module: str) -> list[str] | None:
    """Returns the extras that bring a module, "" for the base package; None: unknown."""
    try:
        wanted = requires(PACKAGE) or []
    except PackageNotFoundError:
        return None
    extras = []
    for requirement in wanted:
        named, _, marker = requirement.partition(";")
        name = re.split(r"[^A-Za-z0-9._-]", named.strip())[0].lower()
        if OTHER_MODULES.get(name, name.replace("-", "_")) == module:
            in_extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
            extras.append(in_extra[1] if in_extra else "")
    return sorted(extras)
