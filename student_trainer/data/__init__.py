"""Text and chats as they lie on disk or on a hub, turned into what a student trains on."""

from student_trainer.data.batches import batches, digest, pack
from student_trainer.data.text import documents, find_files, read_text

__all__ = [
    "batches",
    "digest",
    "documents",
    "find_files",
    "pack",
    "read_text",
]
