"""Scores and encodes sequences: queue -> batch -> scored -> bytes."""

from teacher_server.pipeline.encoding import Encoding, Part
from teacher_server.pipeline.pipeline import Pipeline
from teacher_server.scheduling.job import SequenceJob

__all__ = ["Encoding", "Part", "Pipeline", "SequenceJob"]
