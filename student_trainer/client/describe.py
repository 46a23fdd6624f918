"""Asks one replica to describe itself, more than once where a flipped bit would decide a run."""

import grpc

from logitstream.diagnosis import in_short
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer.errors import ProtocolError

Metadata = tuple[tuple[str, str], ...]

RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Statuses after which another call is made: transport, drain, restart."""
NOT_A_MESSAGE = "an answer that is not a message"


async def describe(
    channel: grpc.aio.Channel, metadata: Metadata, timeout_s: float
) -> teacher_pb2.TeacherInfo:
    """Asks a replica to describe itself. Raises grpc.aio.AioRpcError.

    Asks twice before it reports an error that ends a training run: plain TCP delivers flipped bits.
    """
    stub = teacher_pb2_grpc.TeacherStub(channel)
    for attempt in (1, 2):
        try:
            info = await stub.Describe(
                teacher_pb2.DescribeRequest(), timeout=timeout_s, metadata=metadata
            )
        except grpc.aio.AioRpcError as error:
            if attempt == 2 or error.code() in RETRIED:
                raise
            continue
        if info is not None:  # gRPC hands out None for bytes that are not a message
            return info
    nothing = grpc.aio.Metadata()
    raise grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, nothing, nothing, NOT_A_MESSAGE)


async def confirm(
    first: teacher_pb2.TeacherInfo,
    address: str,
    channel: grpc.aio.Channel,
    metadata: Metadata,
    timeout_s: float,
) -> teacher_pb2.TeacherInfo:
    """Asks again until two answers agree, `first` among them. Raises ProtocolError if none do.

    Plain TCP delivers flipped bits, and a whole run starts from this answer or is ended by it.
    """
    second = await describe(channel, metadata, timeout_s)
    if _lasting(second) == _lasting(first):
        return second
    third = await describe(channel, metadata, timeout_s)
    if _lasting(third) in (_lasting(first), _lasting(second)):
        return third
    raise ProtocolError(
        f"{address} was asked three times to describe its teacher and gave three different "
        "answers: the network in between damages data. Use TLS, which detects damage, or another "
        "route to the service."
    )


def own_card(info: teacher_pb2.TeacherInfo) -> teacher_pb2.Replica:
    """Returns the card of the replica that answered; without one it counts as ready."""
    own = (card for card in info.replicas if card.id == info.replica_id)
    return next(own, teacher_pb2.Replica(state="ready"))


def explain(error: grpc.aio.AioRpcError) -> str:
    """Returns the service's own words in full, and gRPC's own in short."""
    if error.code() in RETRIED:
        return in_short(error.code(), error.details())
    return f"{error.code().name}: {error.details()}"


def _lasting(info: teacher_pb2.TeacherInfo) -> bytes:
    """Serializes what a replica says of its service that stays from one call to the next."""
    lasting = teacher_pb2.TeacherInfo()
    lasting.CopyFrom(info)
    lasting.ClearField("replicas")
    lasting.ClearField("replica_id")  # behind some proxies each call reaches another replica
    lasting.caller.ClearField("tokens_left_today")
    return lasting.SerializeToString(deterministic=True)
