"""Reaches the directory of leases, an actor of the Ray cluster."""

import asyncio
import contextlib
import logging
import secrets
from pathlib import Path

import ray
from ray.actor import ActorProxy
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teacher_server.ledger.directory import Directory
from teacher_server.ledger.lease import DirectoryAway, Lease, LeaseRequest, UsageRow

logger = logging.getLogger(__name__)

NAMESPACE = "logitstream"
"""Of the actors; each has the name of its application."""
CLOSE_S = 5.0
"""How long a directory may take to close its ledger."""


class RayDirectory:
    """Forwards calls to the directory of an application, and makes one if there is none."""

    def __init__(self, application: str, folder: Path | None) -> None:
        self._application = application
        self._folder = folder
        self._actor: ActorProxy[Directory] | None = None

    async def sync(
        self,
        holder: str,
        segment: tuple[int, bytes] | None,
        requests: dict[str, LeaseRequest],
        *,
        ended: bool = False,
    ) -> dict[str, Lease]:
        return await self._call("sync", holder, segment, requests, ended=ended)

    async def usage(self, team: str | None, since: int) -> list[UsageRow]:
        return await self._call("usage", team, since)

    async def close(self) -> None:
        self._actor = None

    async def _call(self, method: str, *arguments: object, **options: object):
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(
                    open_directory, self._application, self._folder
                )
            return await getattr(self._actor, method).remote(*arguments, **options)
        except (RayError, ValueError) as error:
            # It restarts by itself; one that is dead for good is made again by the next call.
            if not isinstance(error, RayTaskError | ActorUnavailableError):
                self._actor = None
            raise DirectoryAway(last_line(error)) from error


def open_directory(application: str, folder: Path | None) -> ActorProxy[Directory]:
    """Returns the directory of an application, made if there is none; may block for a while.

    It stays on the node that has the folder: that of the process that asked first. It ends when the
    process that made it drops its last handle; the next process that asks makes it again.
    """
    key = _node_key(application)
    here = ray.get_runtime_context().get_node_id()
    internal_kv._internal_kv_put(key, here, overwrite=False)
    node = internal_kv._internal_kv_get(key).decode()
    if not any(info["NodeID"] == node and info["Alive"] for info in ray.nodes()):
        if folder is not None:
            logger.error("the node with the ledger is gone; another one begins here, in %s", folder)
        internal_kv._internal_kv_put(key, here, overwrite=True)
        node = here
    make = ray.remote(Directory).options(
        num_cpus=0,
        max_restarts=-1,
        name=application,
        namespace=NAMESPACE,
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return make.remote(folder)


def service_id(application: str) -> str:
    """Returns what all replicas of an application share for as long as it is on the cluster."""
    key = _service_key(application)
    internal_kv._internal_kv_put(key, secrets.token_hex(16), overwrite=False)
    return internal_kv._internal_kv_get(key).decode()


def forget_application(application: str) -> None:
    """Closes the directory of an application and removes what the cluster keeps of it.

    Raises ValueError if there is no such directory.
    """
    actor = ray.get_actor(application, NAMESPACE)
    with contextlib.suppress(RayError):
        ray.get(actor.close.remote(), timeout=CLOSE_S)
    ray.kill(actor)
    for key in (_service_key(application), _node_key(application)):
        internal_kv._internal_kv_del(key)


def last_line(error: BaseException) -> str:
    """Returns the last line of an error that an actor raised: the others are its traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _node_key(application: str) -> str:
    return f"logitstream/directory-node/{application}"


def _service_key(application: str) -> str:
    return f"logitstream/service-id/{application}"
