"""A client that asks for hundreds of MiB of targets, takes one part of them and stops reading."""

import threading
import time
from contextlib import AbstractContextManager

import grpc
import torch
from torch import Tensor

from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer.client.remote import RemoteTeacher

TOKENS = 201
"""Of each request; at a vocabulary of 32,000 and dense:f32 its answer takes 25 parts of 1 MiB."""
PARTS = 25


class StalledReader(AbstractContextManager["StalledReader"]):
    """Offers the service at `address` about `mib` MiB of answers, and reads one part."""

    def __init__(self, address: str, mib: int) -> None:
        self.parts = 0
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.max_receive_message_length", -1)]
        )
        spec = teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))
        ids = torch.arange(TOKENS, dtype=torch.int32).numpy().tobytes()
        requests = (
            teacher_pb2.ScoreRequest(request_id=n, token_ids=ids, lengths=[TOKENS], targets=spec)
            for n in range(max(1, mib // PARTS))
        )
        self._call = teacher_pb2_grpc.TeacherStub(self._channel).Score(requests)
        first = threading.Thread(target=self._read_one, daemon=True)
        first.start()
        first.join(30)
        time.sleep(0.5)  # what the service can send without being read is sent

    def _read_one(self) -> None:
        assert next(self._call).HasField("part")
        self.parts += 1

    def __exit__(self, *_: object) -> None:
        self._call.cancel()
        self._channel.close()


def tokens_per_s(teacher: RemoteTeacher, count: int, sequence: Tensor) -> float:
    """What another client gets meanwhile."""
    began = time.perf_counter()
    assert len(list(teacher.stream([sequence] * count, ahead=4))) == count
    return count * len(sequence) / (time.perf_counter() - began)
