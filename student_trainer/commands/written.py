"""Finds data that a teacher wrote, and refuses what cannot be learnt from it, before it is read."""

from pathlib import Path

from student_trainer.config import TrainConfig
from student_trainer.record.folder import BESIDE
from student_trainer.record.written import WrittenSummary, is_written, summarize


def find_written(config: TrainConfig) -> list[WrittenSummary]:
    """Returns what is known of each --data that `generate` wrote.

    Raises ValueError if --record alone is to be learnt from and holds no texts, or longer ones than
    the run reads.
    """
    found = [summarize(name) for name in config.data if _may_be(name) and is_written(name)]
    if not (config.record and config.record in config.data):
        return found
    own = next((one for one in found if one.folder == config.record), None)
    if own is None:
        raise ValueError(
            f"--data is missing: {config.record} holds no texts that a teacher wrote (student-trainer "
            "generate), which could be data too. Give the data that its targets are of"
        )
    if own.longest > config.sequence_length:
        raise ValueError(
            f"--sequence-length must be at least {own.longest}, the longest text in {own.folder}, since "
            f"its targets are found by whole texts; got {config.sequence_length}"
        )
    return found


def _may_be(name: str) -> bool:
    return "://" in name or (Path(name).expanduser() / BESIDE).is_dir()
