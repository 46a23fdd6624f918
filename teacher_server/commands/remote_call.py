"""Calls a running service, for the commands that ask it something."""

import sys
from collections.abc import Callable
from typing import TypeVar

import grpc

from logitstream.connection import Connection
from logitstream.diagnosis import diagnose, in_short
from logitstream.options import AddressedService
from protos import teacher_pb2_grpc

Answer = TypeVar("Answer")
ANSWER_S = 10.0


class NoAnswer(Exception):
    """The service did not answer; the text says why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def connection_of(config: AddressedService) -> Connection:
    """Returns how a command reaches its service. Raises NoAnswer for unusable settings."""
    try:
        return Connection.to(config.address, **config.credentials())
    except (OSError, ValueError) as error:
        raise NoAnswer(str(error), 2) from None


def ask(
    connection: Connection,
    call: Callable[[teacher_pb2_grpc.TeacherStub], Callable[..., Answer]],
    request: object,
    *,
    address: str = "",
    timeout_s: float = ANSWER_S,
) -> Answer:
    """Makes one call, such as `lambda stub: stub.Describe`, and returns the answer.

    address: another one than the first of the connection. Raises NoAnswer.
    """
    address = address or connection.addresses[0]
    with connection.blocking_channel(address) as channel:
        return ask_on(channel, connection, address, call, request, timeout_s=timeout_s)


def ask_on(
    channel: grpc.Channel,
    connection: Connection,
    address: str,
    call: Callable[[teacher_pb2_grpc.TeacherStub], Callable[..., Answer]],
    request: object,
    *,
    timeout_s: float = ANSWER_S,
) -> Answer:
    """Makes one call as `ask` does, over an open channel to `address`. Raises NoAnswer."""
    try:
        method = call(teacher_pb2_grpc.TeacherStub(channel))
        return method(request, timeout=timeout_s, metadata=connection.metadata)
    except grpc.RpcError as error:
        raise NoAnswer(_explain(connection, address, error), 1) from None


def report_failure(error: NoAnswer) -> int:
    """Prints on stderr why there was no answer; returns the exit code."""
    print(f"teacher-server: {error}", file=sys.stderr)
    return error.exit_code


def _explain(connection: Connection, address: str, error: grpc.RpcError) -> str:
    """Says why a service did not answer a blocking call, for the person who typed the command."""
    code, details = error.code(), error.details()  # type: ignore[attr-defined]
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return f"{address} refused: {details}"
    why = diagnose(address, connection) if code == grpc.StatusCode.UNAVAILABLE else ""
    hint = why or "Is the address right, and the service ready?"
    return f"no answer from {address}. {hint} (gRPC: {in_short(code, details)})"
