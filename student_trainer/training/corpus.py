"""Reads the data of a run with the student's tokenizer."""

import copy
import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from student_trainer.config import CorpusConfig
from student_trainer.data.collate import Collator
from student_trainer.data.rows import (
    RowSettings,
    Summary,
    build_rows,
    hash_values,
    identify_stream,
    stream_rows,
)
from student_trainer.data.sources import Shard, SplitShard, find_shards

logger = logging.getLogger(__name__)

TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model"}
"""Beside those that the class of a tokenizer names."""
HELD_OUT_EVERY = 20
"""Of how many rows one is held out, unless there is other held-out data."""
SHUFFLED_ROWS = 1000
"""Of a stream: a row is drawn at random from so many that were read ahead."""


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """The data of a run, as the student reads it.

    A row is a dict of 1-D int64 tensors: input_ids; labels, if there are tokens that are not trained
    (-100); position_ids, if it has several documents, at each of which they begin at 0. With several
    teachers it also has the name of its own.
    """

    tokenizer: Any
    train: Any
    """datasets.Dataset, or datasets.IterableDataset, of the rows to train on."""
    held_out: Any
    """datasets.Dataset of the rows to measure on."""
    collate: Callable[[Sequence[Any]], dict[str, Any]]
    """Makes a batch of rows, as models of transformers take it."""
    digest: str
    """Of the rows to train on; of a stream, which nobody has read to its end, of its files."""
    held_out_digest: str
    num_sequences: int | None = None
    """Rows to train on; like the next two, None if the data is a stream."""
    num_tokens: int | None = None
    num_trained_tokens: int | None = None
    """Tokens that are trained to be predicted: rows that the teacher is asked for."""
    largest_ids: dict[str, int] = field(default_factory=dict)
    """By the name of what was read: the largest token id in it."""
    notes: list[str] = field(default_factory=list)
    """What was cut, split, or left out, in sentences."""

    @property
    def is_stream(self) -> bool:
        """Whether the rows to train on have no number and no end."""
        return self.num_sequences is None


def read_tokenizer(student: Path) -> Any:
    """Of a student's folder. Raises ValueError if it has none."""
    import transformers

    check_folder(student)
    no_tokenizer = (
        f"the student in {student} has no tokenizer (no tokenizer.json or the like): put the "
        "teacher's into it, AutoTokenizer.from_pretrained(TEACHER).save_pretrained(STUDENT)"
    )
    names = {one.name for one in student.iterdir()}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    except RecursionError:
        raise ValueError(f"a file of the tokenizer in {student} is nested too deep") from None
    except (OSError, ValueError):
        if names & {*TOKENIZER_FILES, "vocab.json", "vocab.txt"}:
            raise  # there is one, and something is wrong with it
        raise ValueError(no_tokenizer) from None
    # Without any file of it some classes make an empty one, which knows no word.
    files = set(type(tokenizer).vocab_files_names.values())
    if files and not names & (files | TOKENIZER_FILES):
        raise ValueError(no_tokenizer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class Texts:
    """Names what a run reads."""

    data: list[list[Shard]]
    """Sources that are drawn from by their weights; one if there are no weights."""
    held_out: list[Shard]
    """Empty if a part of `data` is held out."""


def find_texts(config: CorpusConfig) -> Texts:
    """Finds the data, and the held-out data if it is given, before any of it is read.

    Raises FileNotFoundError, and ValueError for what can be refused already.
    """
    names = [[name] for name in config.data] if config.data_weights else [config.data]
    found = [find_shards(one, split=config.split, streaming=config.streaming) for one in names]
    held_out = find_shards(
        config.held_out or (config.data if config.held_out_split else []),
        split=config.held_out_split,
        streaming=config.streaming,
    )
    if config.held_out_split and not any(isinstance(one, SplitShard) for one in held_out):
        raise ValueError(
            f"--held-out-split {config.held_out_split} is for data sets of the hub and folders of "
            f"Parquet files, and {held_out[0].name} is a file: give --held-out files"
        )
    if config.chat_template:
        read_template(config.chat_template)
    return Texts(found, held_out)


def read_template(path: str) -> str:
    """Reads a file with a chat template. Raises ValueError."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--chat-template {path} cannot be read: {error}") from None


def read_corpus(config: CorpusConfig, tokenizer: Any, *, repeat: bool = True) -> Corpus:
    """Reads, tokenizes and lays out the data.

    repeat: whether a stream begins again when it ends, in the same order. Raises ValueError,
    FileNotFoundError, OSError.
    """
    texts = find_texts(config)
    if config.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = read_template(config.chat_template)
    settings = RowSettings(
        config.sequence_length,
        config.packing,
        config.trained_rows,
        config.text_column,
        config.teacher_column,
    )
    notes: list[str] = []

    def build(shards: list[Shard], label: str, limit: int | None = None) -> Any:
        rows, found = build_rows(shards, settings, tokenizer, label=label, limit=limit)
        notes.extend(found)
        return rows

    held_out: Any = None
    if texts.held_out:
        held_out = build(texts.held_out, "held-out data", config.held_out_sequences)
    labels = config.data if config.data_weights else ["data"]
    if config.streaming:
        sources = [stream_rows(one, settings, tokenizer) for one in texts.data]
    else:
        sources = [build(one, label) for one, label in zip(texts.data, labels, strict=True)]
        if held_out is None:
            kept = [
                _hold_out(*one, config.sequence_length) for one in zip(sources, labels, strict=True)
            ]
            sources = [train for train, _ in kept]
            # The same for every seed, so that runs can be compared.
            held_out = _mix([part for _, part in kept], config, "first_exhausted", seed=0)
            held_out = held_out.select(range(min(config.held_out_sequences, len(held_out))))
    for note in notes:
        logger.warning(note)
    train = _mix(sources, config, "all_exhausted", seed=config.seed)
    of_held_out = Summary.of(held_out, config.teacher_column)
    found: dict[str, int] = {}
    if config.streaming:
        train = train.shuffle(seed=config.seed, buffer_size=SHUFFLED_ROWS)
        train = train.repeat(None) if repeat else train
        shards = [shard for source in texts.data for shard in source]
        digest = identify_stream(shards, settings, tokenizer, config.data_weights)
        sizes = None, None, None
    else:
        whole = Summary.of(train, config.teacher_column)
        found["data"] = whole.largest_id
        digest, sizes = whole.digest, (len(train), whole.num_tokens, whole.num_trained)
        if len(sources) > 1:  # the order is the seed's
            parts = [Summary.of(one, config.teacher_column).digest for one in sources]
            digest = hash_values([*parts, config.data_weights])
    return Corpus(
        tokenizer,
        train,
        held_out,
        Collator.of(tokenizer, config.teacher_column),
        digest,
        of_held_out.digest,
        *sizes,
        largest_ids={**found, "the held-out text": of_held_out.largest_id},
        notes=notes,
    )


def _mix(sources: list[Any], config: CorpusConfig, stopping_strategy: Any, *, seed: int) -> Any:
    """Returns the rows of sources, each drawn from one of them by their weights."""
    if len(sources) == 1:
        return sources[0]
    import datasets

    weights = [weight / sum(config.data_weights) for weight in config.data_weights]
    mixed = datasets.interleave_datasets(
        sources, probabilities=weights, seed=seed, stopping_strategy=stopping_strategy
    )
    return mixed.with_format("torch")


def _hold_out(rows: Any, label: str, length: int) -> tuple[Any, Any]:
    """Splits rows into those to train on and every 20th. Raises ValueError if there are too few."""
    held_out = range(HELD_OUT_EVERY - 1, len(rows), HELD_OUT_EVERY)
    if not held_out:
        raise ValueError(
            f"{label} is too short to hold some out: it has {len(rows)} sequences of {length} "
            "tokens, and every 20th is held out. Give more, or --held-out files."
        )
    kept = [at for at in range(len(rows)) if at % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return rows.select(kept), rows.select(held_out)


def check_ids(corpus: Corpus, num_ids: int) -> None:
    """Raises ValueError for a token that student and teacher do not share.

    Of a stream only the held-out text is known before it is trained on.
    """
    for name, largest in corpus.largest_ids.items():
        if largest >= num_ids:
            token = corpus.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{name} has token {token!r}, id {largest:,}; student and teacher share ids 0 to "
                f"{num_ids - 1:,}. Leave it out of the text."
            )


def check_names(corpus: Corpus, column: str, names: Collection[str]) -> None:
    """Raises ValueError for a row of an unknown teacher.

    Of a stream only the held-out text is known before it is trained on.
    """
    parts = {"the held-out text": corpus.held_out}
    if not corpus.is_stream:
        parts["the data"] = corpus.train
    for label, rows in parts.items():
        unknown = sorted({*rows.unique(column)} - {*names})
        if unknown:
            raise ValueError(
                f"{label} names the teacher {unknown[0]!r} in {column!r}; the teachers are "
                f"{', '.join(names)}"
            )


def check_folder(student: Path) -> None:
    """Raises ValueError for what is no folder of a student: the hub would be asked for it."""
    if (student / "config.json").is_file():
        return
    if student.exists():
        raise ValueError(f"{student} is not a student folder: it has no config.json")
    name = str(student)
    advice = "Give the path of a Hugging Face folder."
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        folder = name.rpartition("/")[2]
        advice = (
            "If it is a model of the Hugging Face hub, download it first (hf download "
            f"{name} --local-dir {folder}) and give --student {folder}."
        )
    raise ValueError(f"there is no folder {name}, where the student should be. {advice}")
