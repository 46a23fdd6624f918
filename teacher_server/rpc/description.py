"""Describes one replica to clients and to the other replicas of its service."""

import secrets
from collections.abc import Iterable

import torch

from protos import teacher_pb2
from teacher_server.monitoring.memory import device_nbytes, resident_nbytes
from teacher_server.pipeline.pipeline import Pipeline


class Description:
    """Holds what changes about a replica, and builds the messages that describe it.

    teacher: what stays the same as long as the replica lives.
    """

    def __init__(
        self, teacher: teacher_pb2.TeacherInfo, pipeline: Pipeline, device: torch.device
    ) -> None:
        self.replica_id = secrets.token_hex(4)
        self.address = ""
        """HOST:PORT that clients and other replicas are sent to."""
        self.state = "starting"
        """Or ready, draining, stuck."""
        self._others: list[teacher_pb2.Replica] = []
        self._teacher = teacher
        self._pipeline = pipeline
        self._device = device

    def set_others(self, cards: Iterable[teacher_pb2.Replica]) -> None:
        """Replaces the cards of the other replicas; this one's own among them is left out."""
        self._others = [card for card in cards if card.id != self.replica_id]

    def card(self) -> teacher_pb2.Replica:
        """Returns what clients and the other replicas know of this one."""
        return teacher_pb2.Replica(
            id=self.replica_id,
            address=self.address,
            state=self.state,
            busy_ms=int(1000 * self._pipeline.busy_s),
        )

    def info(self) -> teacher_pb2.TeacherInfo:
        """Returns the answer to Describe, without the fields about the caller."""
        info = teacher_pb2.TeacherInfo(
            replica_id=self.replica_id, replicas=[self.card(), *self._others]
        )
        info.MergeFrom(self._teacher)
        return info

    def status(self) -> teacher_pb2.ReplicaStatus:
        """Returns how busy the replica is, without the number of its streams."""
        load = self._pipeline.workload()
        running, waiting = self._pipeline.num_texts
        status = teacher_pb2.ReplicaStatus(
            id=self.replica_id,
            address=self.address,
            state=self.state,
            queued_tokens=self._pipeline.queued_tokens,
            batch_fill=load.pass_tokens / self._pipeline.max_batch_tokens,
            encode_ms=1e3 * load.encode_s,
            compact_ms=1e3 * load.compact_s,
            tokens_per_second=load.tokens_per_s,
            memory_bytes=resident_nbytes(),
            device_memory_bytes=device_nbytes(self._device),
            busy=load.busy,
            texts_running=running,
            texts_waiting=waiting,
            written_tokens_per_second=load.written_per_s,
        )
        for stage, seconds in load.stage_s.items():
            setattr(status, f"{stage}_ms", 1e3 * seconds)
        return status
