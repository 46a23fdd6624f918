"""Remembers in a Trainer's checkpoints which teacher they were trained with."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from student_trainer.errors import IncompatibleTeacher

logger = logging.getLogger(__name__)

IDENTITY_FILE = "distillation.json"
"""In a checkpoint: the teacher and the settings it was trained with."""


def write_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Writes the teacher's fingerprint and the settings of the loss into a checkpoint."""
    (checkpoint / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raises IncompatibleTeacher if a checkpoint is of another teacher, ValueError if it is damaged.

    Other settings are the user's to change: they are logged.
    """
    path = checkpoint / IDENTITY_FILE
    if not path.is_file():
        logger.warning("%s does not say which teacher it was trained with", checkpoint)
        return
    saved = _read_identity(path)
    if saved["teacher_fingerprint"] != identity["teacher_fingerprint"]:
        raise IncompatibleTeacher(
            f"{checkpoint} was trained with another teacher: its fingerprint is "
            f"{saved['teacher_fingerprint']}, this one's is {identity['teacher_fingerprint']}. "
            f"Serve the same weights in the same way, or delete {IDENTITY_FILE} in the "
            "checkpoint to continue with this teacher on purpose."
        )
    for name, value in identity.items():
        if saved.get(name) != value:
            logger.warning("%s was %s and is now %s", name, saved.get(name), value)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the Trainer's checkpoints in a folder, finished or not, the newest last."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=read_step)


def read_step(checkpoint: Path) -> int:
    """Returns the step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def find_newest_complete(output_dir: Path) -> str | bool:
    """Returns the newest checkpoint whose state is readable; that file is written last.

    Without any checkpoint returns True: the Trainer's own error says what is missing.
    """
    if not output_dir.is_dir() or get_last_checkpoint(str(output_dir)) is None:
        return True
    for path in reversed(list_checkpoints(output_dir)):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError, RecursionError):
            logger.warning("%s is incomplete and is skipped", path)
    return True


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text())
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict) or not isinstance(saved.get("teacher_fingerprint"), str):
        raise ValueError(
            f"{path} is damaged: it does not say which teacher the checkpoint was trained with. Delete "
            "it to continue with this teacher, or resume from an older checkpoint."
        )
    return saved
