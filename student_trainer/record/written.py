"""Describes the texts that a teacher wrote to a folder: who wrote them, how, and what they are like."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from student_trainer.errors import RecordError
from student_trainer.record.folder import BESIDE, Folder
from student_trainer.record.provenance import Provenance
from student_trainer.record.shards import DAMAGE, Shards

COLUMNS = (
    "prompt_key",
    "token_ids",
    "prompt_tokens",
    "finish",
    "entropy",
    "nats",
    "repetition",
    "settings",
)


@dataclass(frozen=True, slots=True)
class WrittenSummary:
    """Holds what is known of the texts in a folder. None: it could not be known."""

    folder: str
    teacher: str
    revision: str
    teacher_fingerprint: str
    weights_fingerprint: str
    vocab_size: int
    targets: str
    target_temperature: float
    settings: list[dict[str, Any]]
    """How they were drawn; several, if they were written with different settings."""
    texts: int
    prompts: int
    """Different ones."""
    prompt_tokens: int
    tokens: int
    """Written after the prompts."""
    mean_tokens: float
    """Of a text, without its prompt."""
    longest: int
    """Tokens of a text with its prompt."""
    finish: dict[str, int]
    """Texts by how they ended."""
    repetition: float
    """Share of runs of four tokens that were in the same text before, mean over the texts."""
    entropy: float | None
    """Mean entropy of the distributions that tokens were drawn from, in nats."""
    nats: float | None
    """Mean of minus the logprob of the tokens: the teacher's loss on what it wrote."""
    bytes_per_token: float
    """Of the stored targets."""
    tokens_per_s: float | None
    """As it was written, over all runs of the command."""


def is_written(folder: str) -> bool:
    """Whether a folder, or URL, holds texts that `generate` wrote. Raises RecordError."""
    shards = Shards(Folder(folder))
    try:
        return any(shards.is_written(name) for name in shards.names()[:1])
    except DAMAGE:  # who reads it says what is wrong
        return False
    finally:
        shards.close()


def summarize(where: str) -> WrittenSummary:
    """Reads what a folder's texts are like. Raises RecordError if there are none, or one is damaged."""
    folder = Folder(where)
    shards = Shards(folder)
    names = shards.names()
    columns: dict[str, list[np.ndarray]] = {}
    settings: dict[str, None] = {}
    finish: Counter[str] = Counter()
    payload_nbytes, provenance = 0, None
    try:
        for name in names:
            found = _read_shard(shards, name, columns)
            provenance = provenance or found[0]
            settings.update(dict.fromkeys(found[1]))
            finish.update(found[2])
            payload_nbytes += found[3]
    finally:
        shards.close()
    if provenance is None:
        raise RecordError(
            f"{where} holds no texts of a teacher: student-trainer generate writes them"
        )
    values = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    lengths, before = values["length"], values["prompt_tokens"]
    num_tokens, info = int(lengths.sum()), provenance.info()
    return WrittenSummary(
        folder=where,
        teacher=info.model,
        revision=info.revision,
        teacher_fingerprint=info.teacher_fingerprint,
        weights_fingerprint=info.weights_fingerprint,
        vocab_size=info.vocab_size,
        targets=provenance.spec,
        target_temperature=provenance.temperature,
        settings=[json.loads(one) for one in settings],
        texts=len(lengths),
        prompts=len(np.unique(values["prompt_key"])),
        prompt_tokens=int(before.sum()),
        tokens=num_tokens,
        mean_tokens=float(lengths.mean()),
        longest=int((lengths + before).max()),
        finish=dict(sorted(finish.items())),
        repetition=float(values["repetition"].mean()),
        entropy=_mean(values["entropy"], lengths),
        nats=_mean(values["nats"], lengths),
        bytes_per_token=payload_nbytes / num_tokens,
        tokens_per_s=_find_speed(folder, {*names}),
    )


def _read_shard(
    shards: Shards, name: str, columns: dict[str, list[np.ndarray]]
) -> tuple[Provenance, list[str], list[str], int]:
    """Adds the numbers of a shard; returns its provenance, settings, finishes, and bytes of targets."""
    try:
        if not shards.is_written(name):
            raise RecordError(f"{name} is of a record of other texts, which nobody wrote for it")
        provenance, table = shards.provenance(name), shards.read(name, COLUMNS)
        nbytes = shards.column_nbytes(name, "targets")
    except DAMAGE as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(
            f"{name} is damaged ({error}): run student-trainer generate again, which sets it aside and "
            "writes its texts anew"
        ) from error
    keys = b"".join(table.column("prompt_key").to_pylist())
    numbers = {
        "prompt_key": np.frombuffer(keys, "V16"),
        "length": np.diff(_offsets(table.column("token_ids"))),
        **{
            one: table.column(one).to_numpy()
            for one in ("prompt_tokens", "entropy", "nats", "repetition")
        },
    }
    for one, array in numbers.items():
        columns.setdefault(one, []).append(array)
    settings = table.column("settings").unique().to_pylist()
    return provenance, settings, table.column("finish").to_pylist(), nbytes


def _offsets(column: Any) -> np.ndarray:
    return column.combine_chunks().offsets.to_numpy()


def _mean(values: np.ndarray, weights: np.ndarray) -> float | None:
    """Returns the mean over tokens of means over texts; None if a text has none."""
    values = values.astype(np.float64)
    return None if np.isnan(values).any() else float(np.average(values, weights=weights))


def _find_speed(folder: Folder, names: set[str]) -> float | None:
    """Returns tokens per second, of the shards whose writers said how long they took."""
    tokens = seconds = 0.0
    for file in sorted(folder.names(BESIDE)):
        if not (file.startswith("manifest-") and file.endswith(".json")):
            continue
        try:
            sealed = json.loads(folder.read(f"{BESIDE}/{file}"))["shards"]
            for shard in sealed:
                if shard["name"] in names:
                    tokens, seconds = tokens + shard["tokens"], seconds + shard["seconds"]
        except (OSError, ValueError, KeyError, TypeError):  # it only describes
            continue
    return tokens / seconds if seconds else None
