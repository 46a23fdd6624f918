"""Serves the standard health service to every caller, within bounds.

grpc_health's own servicer forgets all watchers of a service when one of them leaves, and accepts any
number of them.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from teacher_server.errors import RequestRefused, invalid

MAX_WATCHES = 256
MAX_NAME = 200
"""Characters in the name of a service; protobuf names are far shorter."""
Status = health_pb2.HealthCheckResponse.ServingStatus


class Health(health_pb2_grpc.HealthServicer):
    """Reports every service as serving until `stop_serving`."""

    def __init__(self, *services: str) -> None:
        self._services = services
        self._status: Status = health_pb2.HealthCheckResponse.SERVING
        self._watches: dict[asyncio.Queue[Status | None], None] = {}
        """What each watch is to send next, None to end it; the oldest first."""

    def stop_serving(self) -> None:
        """Reports NOT_SERVING from now on."""
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        for watch in self._watches:
            watch.put_nowait(self._status)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        _check_name(request.service)
        if request.service not in self._services:
            raise RequestRefused(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_SERVICE",
                f"there is no service of this name here; there are {', '.join(self._services)}.",
                field="service",
            )
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Sends the status now and when it changes. The oldest watch makes room for a new one."""
        _check_name(request.service)
        if len(self._watches) >= MAX_WATCHES:
            oldest = next(iter(self._watches))
            del self._watches[oldest]
            oldest.put_nowait(None)
        watch: asyncio.Queue[Status | None] = asyncio.Queue()
        self._watches[watch] = None
        known = request.service in self._services
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        status: Status | None = self._status if known else unknown
        try:
            while status is not None:
                yield health_pb2.HealthCheckResponse(status=status)
                status = await watch.get()
                if status is not None and not known:
                    status = unknown
        finally:
            self._watches.pop(watch, None)
        raise RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_WATCHES",
            f"more than {MAX_WATCHES} calls of Watch are open, and this is the oldest one. Call "
            "Check now and then instead.",
        )


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise invalid(
            "BAD_SERVICE",
            f"the name of a service may have {MAX_NAME} characters, got {len(name)}.",
            field="service",
        )
