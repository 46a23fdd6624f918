"""Adds to a Trainer's checkpoints what makes them safe to resume from.

    checkpoint-N/run.json    what must be the same in a run that resumes from it, the counts of the
                             run so far, and the digests of all files beside it

It is written last, so a checkpoint without it is one that was being written when the process ended.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from logitstream.files import force_to_disk, write_atomically
from student_trainer.hf.checkpoints import list_checkpoints, read_step
from student_trainer.training.progress import Counts

logger = logging.getLogger(__name__)

SEAL = "run.json"
FILE_DIGESTS, COUNTS, OWN_DIGEST = "file_digests", "counts", "run"
DIGEST = "_digest"
"""How the names of those settings end that stand for content."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors of a file that is cut off or damaged."""


def find_all(folder: Path) -> list[Path]:
    """Returns the sealed checkpoints in a folder, the newest last."""
    return [path for path in list_checkpoints(folder) if (path / SEAL).exists()]


def find_newest(folder: Path) -> Path | None:
    """Returns the newest sealed checkpoint; removes newer ones that were never finished."""
    found = find_all(folder)
    newest = found[-1] if found else None
    for path in list_checkpoints(folder):
        if newest is None or read_step(path) > read_step(newest):
            logger.warning("%s was not finished and is removed", path)
            shutil.rmtree(path)
    return newest


def seal(checkpoint: Path, identity: Mapping[str, Any], counts: Counts) -> None:
    """Forces a checkpoint to the disk and writes its run.json. Raises OSError."""
    names = [name for name in _list_files(checkpoint) if name != SEAL]
    for name in names:
        force_to_disk(checkpoint / name)
    run = {
        **identity,
        COUNTS: asdict(counts),
        FILE_DIGESTS: {name: _digest(checkpoint / name) for name in names},
    }
    run[OWN_DIGEST] = _digest_of_json(run)
    write_atomically(checkpoint / SEAL, json.dumps(run, indent=2) + "\n")
    for name in names:  # safetensors writes for the owner only
        shutil.copymode(checkpoint / SEAL, checkpoint / name)


def rotate(folder: Path, keep: int, *, also: str | None = None) -> None:
    """Removes all but the newest `keep` checkpoints; also: the path of another one to keep."""
    kept = {str(path) for path in find_all(folder)[-keep:]} | {also}
    for path in list_checkpoints(folder):  # also what was left of one when a process ended
        if str(path) not in kept:
            _remove(path)


def clear(folder: Path) -> None:
    """Removes every checkpoint in a folder."""
    for path in list_checkpoints(folder):
        _remove(path)


def check(checkpoint: Path, identity: Mapping[str, Any]) -> Counts:
    """Returns the counts of a checkpoint.

    Raises ValueError if it is of another run, or if a file in it was damaged since it was sealed.
    """
    name = SEAL
    try:
        saved = json.loads((checkpoint / SEAL).read_text())
        if saved.pop(OWN_DIGEST) != _digest_of_json(saved):
            raise ValueError("its bytes have changed")
        digests, counts = saved.pop(FILE_DIGESTS), Counts(**saved.pop(COUNTS))
        different = _differences(saved, _as_json(identity))
        for name in digests if not different else ():
            if _digest(checkpoint / name) != digests[name]:
                raise ValueError("its bytes have changed")
    except UNREADABLE as error:
        raise _make_unusable(checkpoint, name, error) from error
    if different:
        raise _make_of_another_run(checkpoint, different)
    return counts


def refuse_another_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises ValueError if the newest checkpoint in a folder is of another run, as far as is known.

    The identity may lack what is not known yet. A checkpoint that cannot be read is left to `check`.
    """
    newest = next(reversed(find_all(folder)), None)
    if newest is None:
        return
    try:
        found = json.loads((newest / SEAL).read_text())
        saved = {name: found[name] for name in found if name in identity}
    except UNREADABLE:
        return
    if different := _differences(saved, _as_json(identity)):
        raise _make_of_another_run(newest, different)


def _list_files(folder: Path) -> list[str]:
    """Returns the files in a folder and below it, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; without its seal first, so that half of one is never resumed from."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _digest(path: Path) -> str:
    """Returns the digest of a file."""
    if path.stat().st_size == 0:
        return ""
    return xxhash.xxh3_128_hexdigest(np.memmap(path, np.uint8, "r").data)


def _digest_of_json(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(identity)))


def _make_unusable(checkpoint: Path, name: str, error: Exception) -> ValueError:
    before = [one for one in find_all(checkpoint.parent) if read_step(one) < read_step(checkpoint)]
    wrong, what = (
        "is damaged",
        f"Delete {checkpoint} to resume from {before[-1:] and before[-1]}, or give",
    )
    if isinstance(error, FileNotFoundError):
        wrong = "is missing"
    if isinstance(error, PermissionError):
        wrong, what = "may not be read by this user", "Make it readable, or give"
    elif not before:
        what = "There is no older checkpoint: give"
    return ValueError(f"{checkpoint / name} {wrong}. {what} --start-over to begin at step 0.")


def _make_of_another_run(checkpoint: Path, different: list[str]) -> ValueError:
    return ValueError(
        f"{checkpoint} belongs to another run: {'; '.join(different)}. Give what it had, "
        "another --output, or --start-over to delete it and begin again."
    )


def _differences(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Describes what is not the same in two runs."""
    names = [*identity, *(name for name in saved if name not in identity)]
    return [
        f"the content of {name.removesuffix(DIGEST)} has changed"
        if name.endswith(DIGEST)
        else f"{name} was {saved.get(name)!r} and is {identity.get(name)!r}"
        for name in names
        if saved.get(name) != identity.get(name)
    ]
