"""Teams files, tokens and certificates for tests; made by the commands themselves."""

import contextlib
import io
import json
from pathlib import Path

from teacher_server.cli import main


def command(*arguments: object) -> str:
    """Runs `teacher-server ...` in this process; returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([str(one) for one in arguments])
    assert code == 0, f"exit code {code}"
    return out.getvalue()


def add_team(path: Path, name: str, *flags: object) -> str:
    """Declares a team; returns its token."""
    return json.loads(command("team", "add", name, "--teams", path, "--json", *flags))["token"]


def make_certs(folder: Path, *flags: object) -> tuple[str, ...]:
    """Certificates for 127.0.0.1; returns the flags of `serve` that use them."""
    command("certs", "--out", folder, *(flags or ("--host", "127.0.0.1")))
    return ("--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server-key.pem"))
