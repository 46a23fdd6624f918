"""Scores and encodes sequences: queue -> batch -> scored -> bytes; and writes texts."""

from teacher_server.pipeline.encoding import Encoding, Part
from teacher_server.pipeline.pipeline import Pipeline
from teacher_server.pipeline.texts import bound_unread
from teacher_server.pipeline.written import WrittenPart, WrittenParts
from teacher_server.scheduling.generation_job import GenerationJob
from teacher_server.scheduling.job import SequenceJob

__all__ = [
    "Encoding",
    "GenerationJob",
    "Part",
    "Pipeline",
    "SequenceJob",
    "WrittenPart",
    "WrittenParts",
    "bound_unread",
]
