"""Makes the rows that a student is trained on: of shards, read, tokenized and laid out.

Rows of a data set that ends are kept in the cache of `datasets`, so that text is read once; those of
a stream are made when they are needed.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import xxhash
from tqdm import tqdm

from student_trainer.data.columns import Columns, Document, DocumentReader
from student_trainer.data.packing import Counts, Packing, Row, lay_out
from student_trainer.data.sources import Shard

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the rows in the cache: to be raised when the same data would give other ones."""
STREAM_PARTS = 64
"""Of a stream: as many loader workers, of all processes together, can have something to read."""


coalesce: Any = pyarrow.compute.coalesce  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class RowSettings:
    """Says how rows are made of data; "" leaves it to the data."""

    length: int
    packing: Packing | str = ""
    trained_rows: str = ""
    text_column: str = ""
    teacher_column: str = ""

    @property
    def identity(self) -> tuple[Any, ...]:
        """What decides the rows; as it was before there were several teachers, if there is one."""
        values = astuple(self)
        return values if self.teacher_column else values[:-1]


@dataclass(frozen=True, slots=True)
class Plan:
    """Says what was found out about data by its first rows."""

    columns: dict[str, Columns]
    """By the group of a shard."""
    packing: Packing
    has_labels: bool

    @classmethod
    def make(cls, shards: Sequence[Shard], settings: RowSettings, reader: DocumentReader) -> "Plan":
        """Reads the first row of each group. Raises ValueError if it cannot be read as wanted."""
        columns: dict[str, Columns] = {}
        for shard in shards:
            if shard.group in columns:
                continue
            for place, row in islice(shard.rows(), 1):
                found = Columns.find(row, place, settings.text_column, settings.trained_rows)
                reader.check(found)
                columns[shard.group] = found
        are_texts = all(one.form in ("text", "input_ids") for one in columns.values())
        is_joined = are_texts and not settings.teacher_column
        packing: Any = settings.packing or ("concatenate" if is_joined else "pad")
        return cls(columns, packing, any(one.is_masked for one in columns.values()))


def build_rows(
    shards: Sequence[Shard],
    settings: RowSettings,
    tokenizer: Any,
    *,
    label: str,
    limit: int | None = None,
) -> tuple[Any, list[str]]:
    """Returns a `datasets.Dataset` of rows, from the cache if they are there, and notes for the user.

    limit: how many rows are enough. Raises ValueError for damaged data, and if there is no row.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    def generate() -> Iterator[dict[str, Any]]:
        yield from _generate(shards, settings, tokenizer, label, limit)

    is_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # this has one of its own
    try:
        found = datasets.Dataset.from_generator(
            generate, fingerprint=_fingerprint(shards, settings, tokenizer, limit)
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    finally:
        if not is_quiet:
            datasets.enable_progress_bars()
    count = len(found) - 1
    notes = json.loads(found[count]["notes"])
    rows = found.select(range(count)).remove_columns("notes").with_format("torch")
    return rows, [f"{label}: {note}" for note in notes]


def stream_rows(shards: Sequence[Shard], settings: RowSettings, tokenizer: Any) -> Any:
    """Returns a `datasets.IterableDataset` of rows that are made when they are taken.

    It ends when each row was taken once. Loader workers share the shards, in up to STREAM_PARTS parts.
    Raises ValueError if the first rows cannot be read as wanted.
    """
    import datasets

    reader = DocumentReader(tokenizer, settings.teacher_column)
    maker = RowMaker(Plan.make(shards, settings, reader), settings, reader)
    count = min(len(shards), STREAM_PARTS)
    bounds = [len(shards) * part // count for part in range(count + 1)]
    parts = [list(shards[start:end]) for start, end in pairwise(bounds)]
    rows = datasets.IterableDataset.from_generator(maker, gen_kwargs={"parts": parts})
    return rows.with_format("torch")


def identify_stream(
    shards: Sequence[Shard], settings: RowSettings, tokenizer: Any, *more: Any
) -> str:
    """Returns a digest of what decides the rows of a stream, as far as is known before it is read."""
    identities = [[shard.group, *shard.identity] for shard in shards]
    return hash_values([identities, settings.identity, hash_tokenizer(tokenizer), *more])


@dataclass(frozen=True, slots=True)
class Summary:
    """Holds what is known of rows when all of them were looked at."""

    digest: str
    """Of all columns in their order: it differs for other text, another tokenizer, other labels."""
    num_tokens: int
    num_trained: int
    """Rows of the teacher that are asked for: tokens that are trained to be predicted."""
    largest_id: int

    @classmethod
    def of(cls, rows: Any, teacher_column: str = "") -> "Summary":
        """Looks at every row of a `datasets.Dataset`; who teaches it is part of the digest."""
        names = [name for name in ("input_ids", "labels", "position_ids") if name in rows.features]
        hashes = {name: xxhash.xxh3_128() for name in (*names, "lengths")}
        if teacher_column:
            hashes["teachers"] = xxhash.xxh3_128()
        num_tokens = num_trained = largest = 0
        widths: set[int] = set()
        for table in rows.with_format("arrow").iter(1000):
            columns = {name: table[name].combine_chunks() for name in names}
            if "labels" in columns:  # null where all tokens are trained, in a mixture
                columns["labels"] = coalesce(columns["labels"], columns["input_ids"])
            if teacher_column:
                hashes["teachers"].update(json.dumps(table[teacher_column].to_pylist()).encode())
            lengths = columns["input_ids"].value_lengths().to_numpy()
            values = {name: column.flatten().to_numpy() for name, column in columns.items()}
            for name in names:
                hashes[name].update(values[name].astype(np.int64).tobytes())
            hashes["lengths"].update(lengths.astype(np.int64).tobytes())
            widths |= {*lengths.tolist()}
            is_trained = np.ones(len(values["input_ids"]), dtype=bool)
            is_trained[np.cumsum(lengths)[:-1]] = is_trained[:1] = False  # follow nothing
            if "position_ids" in values:
                is_trained &= values["position_ids"] != 0
            if "labels" in values:
                is_trained &= values["labels"] >= 0
            num_tokens += len(is_trained)
            num_trained += int(is_trained.sum())
            largest = max(largest, int(values["input_ids"].max(initial=0)))
        found = hashes["input_ids"].hexdigest()
        if len(hashes) > 2 or len(widths) > 1:
            parts = "".join(f"{name}={one.hexdigest()};" for name, one in hashes.items())
            found = xxhash.xxh3_128_hexdigest(parts.encode())
        return cls(found, num_tokens, num_trained, largest)


@dataclass(frozen=True, slots=True, eq=False)
class RowMaker:
    """Makes rows of shards; can be sent to the workers of a loader."""

    plan: Plan
    settings: RowSettings
    reader: DocumentReader

    def __call__(self, parts: Sequence[Sequence[Shard]]) -> Iterator[Row]:
        """Yields the rows of each part of a stream."""
        for shards in parts:
            yield from self.lay_out(self.read(shards), Counts(), keep_rest=True)

    def read(self, shards: Iterable[Shard]) -> Iterator[Document]:
        """Yields the documents in shards."""
        for shard in shards:
            if shard.group in self.plan.columns:  # or else it is empty
                yield from self.reader.read(shard.rows(), self.plan.columns[shard.group])

    def lay_out(
        self, documents: Iterable[Document], counts: Counts, *, keep_rest: bool = False
    ) -> Iterator[Row]:
        """Yields the rows of documents; see `packing.lay_out`."""
        return lay_out(
            documents,
            self.settings.length,
            self.plan.packing,
            counts,
            has_labels=self.plan.has_labels,
            keep_rest=keep_rest,
            teacher_column=self.settings.teacher_column,
        )


def _generate(
    shards: Sequence[Shard],
    settings: RowSettings,
    tokenizer: Any,
    label: str,
    limit: int | None,
) -> Iterator[dict[str, Any]]:
    """Yields the rows of shards, and behind them one that holds the notes."""
    reader, counts = DocumentReader(tokenizer, settings.teacher_column), Counts()
    plan = Plan.make(shards, settings, reader)
    _look_through(shards, plan, label)
    maker, row = RowMaker(plan, settings, reader), None
    shown = {"desc": f"tokens of {label}", "unit": " documents", "leave": False}
    with tqdm(maker.read(shards), **shown) as documents:
        for row in islice(maker.lay_out(documents, counts), limit):
            yield {**row, "notes": ""}
    if row is None:
        raise ValueError(
            f"{label} has {counts.tokens} tokens; one sequence needs at least {settings.length}"
            if plan.packing == "concatenate"
            else f"{label} has {counts.documents} documents, and none with anything to train"
        )
    notes = counts.describe(settings.length)
    yield {**{name: values[:0] for name, values in row.items()}, "notes": json.dumps(notes)}


def _look_through(shards: Sequence[Shard], plan: Plan, label: str) -> None:
    """Reads all text and logs how much there is. Raises ValueError for what is damaged.

    Tokenizing takes a hundred times as long, so a mistake in the last file shows up before that.
    """
    num_texts = num_characters = 0
    files = [shard for shard in shards if shard.group in (".txt", ".jsonl")]
    with tqdm(desc=f"reading {label}", unit=" texts", leave=False) as progress:
        for shard in files:
            for place, row in shard.rows():
                plan.columns[shard.group].check(row, place)
                num_characters += _count_characters(row)
                num_texts += 1
                progress.update()
    if files:
        logger.info(
            "%s: %s in %s of %s",
            label,
            f"{num_characters:,} characters",
            "1 text" if num_texts == 1 else f"{num_texts:,} texts",
            "1 file" if len(files) == 1 else f"{len(files):,} files",
        )


def _count_characters(value: Any) -> int:
    """Counts the characters of all texts in a row: in its columns, or in the messages of a chat."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_count_characters, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_count_characters, value))
    return 0


def _fingerprint(
    shards: Sequence[Shard], settings: RowSettings, tokenizer: Any, limit: int | None
) -> str:
    """Returns a hash of everything that decides the rows."""
    stamps = [[shard.group, *shard.stamp] for shard in shards]
    return hash_values([FORMAT, stamps, settings.identity, limit, hash_tokenizer(tokenizer)])


def hash_values(values: list[Any]) -> str:
    """Returns a hash of values that JSON can express."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values).encode())


def hash_tokenizer(tokenizer: Any) -> str:
    """Returns a hash of all files of a tokenizer, its chat template among them."""
    found = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
