"""Reaches the directory of leases, an actor of the Ray cluster."""

import asyncio
import logging
import secrets
from pathlib import Path

import ray
from ray.actor import ActorProxy
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teacher_server.cluster.ray_settings import _last_line
from teacher_server.ledger.directory import Directory
from teacher_server.ledger.lease import DirectoryAway, Lease, LeaseRequest, UsageRow

logger = logging.getLogger(__name__)


NAMESPACE = "logitstream"
"""Of the directories; an application's has its name."""


ASK_S = 5.0
"""How long a cluster may take for its first sign of life."""


class RayDirectory:
    """The way to the directory of an application; makes one if there is none."""

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
        return await self._ask("sync", holder, segment, requests, ended=ended)

    async def usage(self, team: str | None, since: int) -> list[UsageRow]:
        return await self._ask("usage", team, since)

    async def close(self) -> None:
        self._actor = None

    async def _ask(self, method: str, *arguments: object, **options: object):
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(directory, self._application, self._folder)
            return await getattr(self._actor, method).remote(*arguments, **options)
        except (RayError, ValueError) as error:
            # It restarts by itself; one that is dead for good is made anew.
            if not isinstance(error, RayTaskError | ActorUnavailableError):
                self._actor = None
            raise DirectoryAway(_last_line(error)) from error


def directory(application: str, folder: Path | None) -> ActorProxy[Directory]:
    """The directory of an application, which is made if there is none; may block for a while.

    It stays on the node that has the folder: that of whoever asked first. It ends when the process
    that made it has no handle of it any more; whoever asks next makes it anew.
    """
    key = _directory_key(application)
    here = ray.get_runtime_context().get_node_id()
    internal_kv._internal_kv_put(key, here, overwrite=False)
    node = internal_kv._internal_kv_get(key).decode()
    if not any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
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


def _directory_key(application: str) -> str:
    return f"logitstream/directory-node/{application}"


def service_id(application: str) -> str:
    """What all replicas of an application have in common, for as long as it is on the cluster."""
    key = _service_key(application)
    internal_kv._internal_kv_put(key, secrets.token_hex(16), overwrite=False)
    return internal_kv._internal_kv_get(key).decode()


def _service_key(application: str) -> str:
    return f"logitstream/service-id/{application}"
