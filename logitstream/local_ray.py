"""Starts a Ray of this process's own on this machine, and leaves nothing of it running.

Ray reads its environment when it is imported, so it is imported only after that has been set.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from logitstream.connection import is_loopback

# Keeps all of Ray's sockets on loopback. Ray has no other switch for that: it replaces a
# --node-ip-address of 127.0.0.1 by the machine's address.
ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Where Ray finds its token."""
STORE_NBYTES = 100 << 20
"""Size of Ray's object store, through which neither program sends more than settings."""
KILL_S, KILL_AGAIN_S = 5.0, 0.2
"""How long processes that outlive Ray are killed for, and the pause between two attempts."""


def set_ray_environment(address: str | None, own: Mapping[str, str]) -> None:
    """Sets what Ray reads when it is imported, for joining `address` or starting a Ray of our own.

    own: what the program sets in addition for a Ray of its own; its processes inherit all of it.
    """
    # A thread that outlives the connection must not start another Ray, as any use of Ray would.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    if not address:
        os.environ.update({**_own_ray_environment(), **own})
    elif is_loopback(address.rpartition(":")[0]):
        os.environ.update(ONE_MACHINE)


def _own_ray_environment() -> dict[str, str]:
    return {
        **ONE_MACHINE,
        # Only holders of the token can make this Ray run anything. It is in no argument and no file.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
    }


class LocalRay:
    """A Ray that this process has started and is connected to, until `stop`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @classmethod
    def start(cls, prefix: str, *, num_cpus: int) -> Self:
        """Starts Ray with a temporary folder of this prefix. Raises what `ray.init` raises.

        num_cpus: worker processes that Ray starts in advance, and what it believes to be there.
        """
        import ray

        # Ray's sockets are files in it, and their paths have to be short: not in TMPDIR.
        folder = tempfile.mkdtemp(prefix=prefix, dir="/tmp")
        try:
            ray.init(
                "local",
                num_cpus=num_cpus,
                object_store_memory=STORE_NBYTES,
                include_dashboard=False,
                logging_level=logging.WARNING,
                _temp_dir=folder,
            )
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(folder)

    def stop(self) -> None:
        """Ends this Ray and every process of it."""
        import ray

        ray.shutdown()
        # Actors outlive a raylet that was killed, with their ports; on a busy machine a controller
        # of Ray Train was seen to hang at its end for ever.
        self.kill_processes()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill_processes(self) -> None:
        """Kills every process of this Ray at once, for up to KILL_S."""
        deadline = time.monotonic() + KILL_S
        while (pids := list(self._processes())) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(KILL_AGAIN_S)

    def _processes(self) -> Iterator[int]:
        """Yields the processes of this Ray except this one, known by the logs that they keep open.

        Programs that are not Ray's may have its logs open too, and are left alone.
        """
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has exited, or belongs to another user
                command = (process / "cmdline").read_bytes()
                if process.name == str(os.getpid()) or not (
                    command.startswith(b"ray::") or b"/ray/" in command
                ):
                    continue
                opened = [os.readlink(file) for file in (process / "fd").iterdir()]
                if any(path.startswith(f"{self._folder}/") for path in opened):
                    yield int(process.name)
