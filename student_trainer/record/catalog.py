"""Knows which sequences a record holds, where each is, and which files are lost."""

import json
import logging
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

from logit_codec import CodecError, IdTable, TargetSpec
from student_trainer.errors import NotRecorded, RecordError
from student_trainer.record.folder import BESIDE, QUARANTINE, Folder, id_table_file
from student_trainer.record.index import Entry, Index
from student_trainer.record.provenance import Provenance, as_list, merge
from student_trainer.record.request import RecordCounters, Request
from student_trainer.record.shards import DAMAGE, DamagedShard, Shards
from student_trainer.teachers.request import Answer, ScoreOptions
from student_trainer.teachers.teacher import Teacher

logger = logging.getLogger(__name__)


class Catalog:
    """Lists the sequences of a record: sealed, not sealed yet, or awaited from the live teacher.

    Callers' threads look sequences up and add awaited ones while the record's thread receives,
    seals and drops them; one lock guards both.
    """

    def __init__(
        self,
        folder: Folder,
        counters: RecordCounters,
        *,
        draws: int,
        is_live: bool,
        writes: bool,
        verify: bool,
    ) -> None:
        """Reads the folder. Raises RecordError, or IncompatibleTeacher if it holds two records.

        draws: how many of a sequence to record. is_live: whether a live teacher can be asked.
        writes: whether damaged files may be moved. verify: whether to compare every shard's digest.
        """
        self.folder = folder
        self.shards = Shards(folder)
        self._counters = counters
        self._draws = draws
        self._is_live = is_live
        self._writes = writes
        self._lock = threading.Lock()
        self._index = Index()
        """Rows that were sealed when the folder was read."""
        self._fresh: dict[bytes, list[Entry]] = defaultdict(list)
        """Entries added since then, by key."""
        self.missing: list[str] = []
        """Shards that a manifest lists and the folder does not have."""
        self.lost: list[str] = []
        """Those, and the damaged ones."""
        self.written: list[str] = []
        """Shards of texts that the teacher wrote, in their order."""
        self.provenance = self._read(verify)
        """What the record was made of; None while it is empty."""

    def __len__(self) -> int:
        """Sequences and draws that can be replayed now; after `close`, those that are sealed."""
        with self._lock:
            fresh = (entry for entries in self._fresh.values() for entry in entries)
            # A closed record never receives what is still awaited.
            return len(self._index) + sum(entry.pending is None for entry in fresh)

    def begin(self, provenance: Provenance) -> None:
        """Sets what an empty record holds; the first request decides that."""
        with self._lock:  # two threads may make the first request
            if self.provenance is None:
                self.provenance = provenance

    def check_options(self, options: ScoreOptions) -> None:
        """Raises InvalidRequest for other targets than the record holds, if it holds any."""
        if self.provenance is not None:
            self.provenance.check_options(self.folder.root, options)

    def assign_draw(self, options: ScoreOptions) -> ScoreOptions:
        """Replaces the epoch by that of the draw to use in it.

        The draw depends on the epoch alone, so that several ranks which record the same sequence in
        different epochs get the same draws.
        """
        return replace(options, epoch=options.epoch % self._num_draws(options.spec))

    def find(self, request: Request, *, any_draw: bool = False) -> Entry | None:
        """Returns the entry that answers a request, or None.

        It is that of the request's seed and epoch, or else another draw of the sequence. any_draw:
        take another one even if the live teacher could still be asked for this one.
        """
        with self._lock:
            return self._find(request, any_draw)

    def find_or_add(self, request: Request, future: "Future[Answer]") -> tuple[Entry | None, bool]:
        """Returns the entry that answers a request, and whether it is new.

        A new entry awaits the live teacher's answer, with this future; without a live teacher there
        is none. Both happen under one lock, so that a sequence is asked for once.
        """
        with self._lock:
            entry = self._find(request, any_draw=False)
            if entry is not None or not self._is_live:
                return entry, False
            entry = Entry(request.options.seed, request.options.epoch, request.row_mask)
            entry.pending = future
            self._fresh[request.key].append(entry)
            return entry, True

    def remove(self, key: bytes, entry: Entry) -> None:
        """Removes an entry that got no answer, or one that is not recorded."""
        with self._lock:
            self._fresh[key] = [kept for kept in self._fresh[key] if kept is not entry]

    def mark_received(self, entry: Entry, payloads: tuple[bytes, ...]) -> None:
        """Puts the live teacher's answer into its entry, so that others get it from memory."""
        with self._lock:
            entry.payloads, entry.pending = payloads, None

    def mark_sealed(self, shard: str, entries: Iterable[Entry]) -> None:
        """Points entries to their rows in a shard, in its order, and frees their payloads."""
        with self._lock:
            for row, entry in enumerate(entries):
                entry.shard, entry.row, entry.payloads = shard, row, ()

    def drop(self, shard: str) -> None:
        """Forgets a shard that turned out to be damaged, so that its rows are asked for again."""
        with self._lock:
            is_known = self._index.drop(shard)
            for key, entries in list(self._fresh.items()):
                kept = [entry for entry in entries if entry.shard != shard]
                is_known |= len(kept) < len(entries)
                self._fresh[key] = kept
        if is_known:  # several reads of one damaged shard report it once
            self._put_aside(shard)
            self.lost.append(shard)

    def describe_losses(self) -> str:
        """Says in words which files are missing and which are damaged."""
        damaged = [name for name in self.lost if name not in self.missing]
        parts = [
            f"{_join(names)} {'is' if len(names) == 1 else 'are'} {what}"
            for names, what in ((self.missing, "missing"), (damaged, "damaged"))
            if names
        ]
        return ", ".join(parts)

    def not_recorded(self, model: str) -> NotRecorded:
        """Returns the error for a sequence that is not here, with the likely cause."""
        named = self.provenance is not None and self.provenance.spec.startswith("given_ids")
        what = "this sequence with these given ids" if named else "this sequence"
        where = f"{what} is not in the record {self.folder.root}"
        if self.lost:
            return NotRecorded(
                f"{where}, which has {len(self)} left: {self.describe_losses()}. Restore the file, "
                "record again with student-trainer record, or give a live teacher as fallback."
            )
        return NotRecorded(
            f"{where}, which has {len(self)} of {model}. It was recorded from other text, with "
            "another tokenizer or cut differently, or these rows were not asked for. Record it "
            "with student-trainer record, or give a live teacher as fallback."
        )

    def _read(self, verify: bool) -> Provenance | None:
        """Indexes all shards, and puts damaged files aside."""
        names = self.shards.names()
        damaged = list(self.shards.find_damaged(names)) if verify else []
        provenance = merge(self.folder.root, self._index_shards(names, damaged))
        self._index.build()
        self.missing, unreadable = missing_shards(self.folder, names)
        for name in (*damaged, *unreadable):
            self._put_aside(name)
        for name in self.missing:
            logger.warning(
                "%s is missing from %s: its sequences are not replayed",
                # A manifest may contain any name, even one that a log cannot hold.
                name.encode("ascii", "backslashreplace").decode(),
                self.folder.root,
            )
        self.lost = [*self.missing, *damaged]
        return provenance

    def _index_shards(
        self, names: Sequence[str], damaged: list[str]
    ) -> Iterator[tuple[str, Provenance, int]]:
        """Indexes each shard and yields its name, provenance and number of rows.

        Skips those in `damaged`, and adds to it those that cannot be read.
        """
        for name in names:
            if name in damaged:
                continue
            try:
                provenance = self.shards.provenance(name)
                identities = self.shards.identities(name)
                is_written = self.shards.is_written(name)
                self._index.add(name, identities)
            except DAMAGE as error:
                try:
                    self.shards.raise_damage(name, error)
                except DamagedShard:
                    damaged.append(name)
                    continue
            if is_written:
                self.written.append(name)
            yield name, provenance, len(identities)

    def _put_aside(self, name: str) -> None:
        """Logs that a file is damaged, and moves it to quarantine if this record may write."""
        self._counters.quarantined += 1
        self.shards.forget(name)  # a store may refuse to move an open file
        outcome = "left where it is, and not used"
        if self._writes:
            try:
                self.folder.quarantine(name)
                outcome = f"moved to {QUARANTINE}/"
            except OSError as error:
                outcome = f"not used, and cannot be moved to {QUARANTINE}/: {error}"
        logger.warning("%s in %s is damaged: %s", name, self.folder.root, outcome)

    def _num_draws(self, spec: TargetSpec) -> int:
        """Draws of each sequence; a record that was made with more of them keeps its number."""
        if not spec.needs_uniforms:
            return 1
        return max(self._draws, self._index.num_draws)

    def _find(self, request: Request, any_draw: bool) -> Entry | None:
        entries = (*self._index.find(request.key), *self._fresh.get(request.key, ()))
        usable = {
            (entry.seed, entry.epoch): entry
            for entry in entries
            if entry.row_mask is None or entry.row_mask == request.row_mask
        }
        exact = usable.get((request.options.seed, request.options.epoch))
        if exact is not None or not usable:
            return exact
        is_missing = len(usable) < self._num_draws(request.options.spec)
        if is_missing and self._is_live and not any_draw:
            return None
        return usable[sorted(usable)[request.options.epoch % len(usable)]]


def missing_shards(folder: Folder, present: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns shards that a manifest lists and the folder lacks, and manifests that are damaged."""
    expected: set[str] = set()
    known: set[str] = {*present, *folder.names(QUARANTINE)}
    unreadable = []
    for file in sorted(folder.names(BESIDE)):
        if not (file.startswith("manifest-") and file.endswith(".json")):
            continue
        name = f"{BESIDE}/{file}"
        try:
            manifest = json.loads(folder.read(name))
            sealed = _as_names(shard["name"] for shard in as_list(manifest["shards"]))
            known |= _as_names(as_list(manifest["lost"]))  # reported when that writer began
            expected |= sealed
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            unreadable.append(name)
    return sorted(expected - known), unreadable


def read_id_tables(
    folder: Folder, provenance: Provenance | None, live: Teacher | None
) -> list[IdTable]:
    """Returns the live teacher's id tables and those of the record. Raises RecordError."""
    tables = [] if live is None else list(live.id_tables)
    digests = () if provenance is None else provenance.id_tables
    for digest in digests:
        if any(table.digest.hex() == digest for table in tables):
            continue
        name = id_table_file(digest)
        try:
            table = IdTable.from_bytes(folder.read(name))
            if table.digest.hex() != digest:
                raise CodecError("its content does not match its name")
        except (OSError, CodecError) as error:
            raise RecordError(
                f"cannot read {folder.root}/{name}, which the targets are coded with: {error}. "
                "Give the live teacher as fallback: it has the table too."
            ) from None
        tables.append(table)
    return tables


def _as_names(values: Iterable[object]) -> set[str]:
    names = set()
    for value in values:
        if not isinstance(value, str):
            raise TypeError("the name of a shard must be a string")
        names.add(value)
    return names


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
