"""Recorded: targets that were written down once, replayed for later epochs, students and teams.

With a live teacher behind it, what is missing is asked of that and written down on the way, so a
record grows where it is used. One thread of its own reads, decodes and writes; the caller's threads
look up and wait. `shards.py` is the record on disk.
"""

import atexit
import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
from google.protobuf.json_format import MessageToDict
from torch import Tensor
from tqdm import tqdm

from logit_codec import (
    CodecError,
    IdTable,
    Targets,
    TargetSpec,
    decode,
    ids_digest,
)
from protos import teacher_pb2
from student_trainer.errors import (
    ForkedClient,
    IncompatibleTeacher,
    InvalidRequest,
    NotRecorded,
    RecordError,
    TeacherError,
)
from student_trainer.record.folder import QUARANTINE, Folder
from student_trainer.record.index import Entry, Index
from student_trainer.record.schema import DAMAGE, Provenance, Row, origin_of
from student_trainer.record.shards import Shards, id_table_file, missing_shards
from student_trainer.record.writer import Writer
from student_trainer.teachers.compatibility import check_compatible
from student_trainer.teachers.layout import as_token_ids
from student_trainer.teachers.request import Answer, Wish, row_mask
from student_trainer.teachers.teacher import Teacher

logger = logging.getLogger(__name__)

SEAL_NBYTES = 64 << 20
"""Content of a shard; so much is held in memory until it is sealed."""
SEAL_S = 60.0
"""What came longer ago than this is sealed with the next answer: a kill loses no more."""
VERIFY_THREADS = 4
REPLAYED_TOGETHER = 8
"""Sequences that are read before the first of them is decoded: reading and decoding in turns push each
other's code and data out of the caches, and take a third longer together."""
CLOSED = "this record is closed; open it again to use it"
NOT_THE_TEACHERS = ("service_id", "replicas", "replica_id", "team", "limits", "server_version")
"""Fields of TeacherInfo that are about the service, not about the teacher."""


@dataclass(slots=True)
class RecordCounters:
    """What a record has handed out so far."""

    rows: int = 0
    payload_nbytes: int = 0
    replayed: int = 0
    """Sequences that came from the record."""
    asked: int = 0
    """Sequences that the live teacher was asked for."""
    quarantined: int = 0
    """Shards that were found damaged."""


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    token_ids: Tensor
    rows: Tensor | None
    wish: Wish
    key: bytes
    row_mask: bytes | None

    @classmethod
    def of(cls, token_ids: Tensor, rows: Tensor | None, wish: Wish) -> "_Request":
        mask = row_mask(rows, len(token_ids) - 1)
        return cls(token_ids, rows, wish, ids_digest(token_ids), mask)


class Recorded(Teacher):
    """A folder of recorded targets as a teacher.

    folder: a path, or a URL that fsspec knows. fallback: a live teacher for what is missing; its
    answers are written to the folder unless `write` is off. tokenizer: the student's; a record of
    another vocabulary is refused. draws: of `sampled` targets, how many draws of a sequence to
    record, as those of epochs 0 to draws - 1; later epochs take them in turn. verify: read every
    shard whole and compare its digest before anything is replayed (default: where the folder is
    local; what is read later is checked anyway). Raises RecordError if there is nothing to replay,
    IncompatibleTeacher for another teacher.

    A sequence is found by its ids. A request gets the draw of its seed and of its epoch modulo the
    record's number of draws. Where that was not recorded it gets another one, by its epoch, unless
    a live teacher can be asked and there are fewer than that number.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fallback: Teacher | None = None,
        *,
        tokenizer: Any = None,
        draws: int = 1,
        write: bool = True,
        verify: bool | None = None,
        seal_nbytes: int = SEAL_NBYTES,
        seal_s: float = SEAL_S,
    ) -> None:
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.counters = RecordCounters()
        self._pid = os.getpid()
        self._closed = False
        self._folder = Folder(folder)
        self._shards = Shards(self._folder)
        self._fallback = fallback
        self._draws = draws
        self._writes = write and fallback is not None
        self._seal_nbytes, self._seal_s = seal_nbytes, seal_s
        self._lock = threading.Lock()
        """Of what is recorded: callers look it up, the worker changes it."""
        self._provenance: Provenance | None = None
        self._index = Index()
        self._fresh: dict[bytes, list[Entry]] = defaultdict(list)
        """What came since the folder was opened, by key."""
        self._lost: list[str] = []
        """Shards that are missing or damaged."""
        self._missing: list[str] = []
        self._writer: Writer | None = None
        self._wanted: deque[tuple[_Request, Entry, Future[Answer]]] = deque()
        """What is to be replayed; there is a call of `_replay` to come for each."""
        self._unsealed: list[tuple[Row, Entry]] = []
        self._unsealed_nbytes = 0
        self._unsealed_since_s = 0.0
        self._failure: TeacherError | None = None
        """Why nothing can be written any more."""
        self._read(self._folder.is_local if verify is None else verify)
        if fallback is not None:
            self._check_same_teacher(fallback.info)
        elif self._provenance is None:
            lost = f"; {self._losses()}" if self._lost else ""
            raise RecordError(
                f"there is no record in {folder}{lost}. Make one with student-trainer record, or "
                "give a live teacher as fallback."
            )
        if self._provenance is not None:
            self.default_targets = self._provenance.spec
        self._info = self._provenance_info() if fallback is None else fallback.info
        check_compatible(self._info, tokenizer)
        if self._provenance is not None:
            check_compatible(self._provenance.info(), None)
        self.id_tables = self._read_id_tables()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="record")
        atexit.register(self.close)

    def __len__(self) -> int:
        """Sequences and draws that can be replayed now; of a record that was closed: that are sealed."""
        with self._lock:
            fresh = (entry for entries in self._fresh.values() for entry in entries)
            # What is on its way never comes once the record is closed.
            return len(self._index) + sum(entry.asked is None for entry in fresh)

    def has(self, token_ids: Any, seed: int = 0, epoch: int = 0) -> bool:
        """Whether all rows of a sequence would be replayed, without asking the live teacher."""
        if self._provenance is None:
            return False
        request = self._request_of(token_ids, seed, epoch)
        with self._lock:
            return self._find(request) is not None

    @property
    def info(self) -> teacher_pb2.TeacherInfo:
        """Of the teacher that was recorded."""
        return self._info

    @property
    def fallback(self) -> Teacher | None:
        """The live teacher behind it."""
        return self._fallback

    @property
    def temperature(self) -> float:
        """Of what was recorded; 1.0 while nothing is."""
        return 1.0 if self._provenance is None else self._provenance.temperature

    def get(self, token_ids: Any, *, seed: int = 0, epoch: int = 0) -> Targets:
        """The targets of all rows of one sequence. Raises NotRecorded, whoever could be asked."""
        self.check_usable()
        request = self._request_of(token_ids, seed, epoch)
        with self._lock:
            entry = self._find(request, any_draw=True)
        if entry is None or entry.asked is not None:
            raise self._not_recorded()
        try:
            return self._worker.submit(lambda: self._fetch(request, entry)()).result().targets
        except _Damaged as damaged:
            self._worker.submit(self._drop, damaged.shard).result()
        return self.get(token_ids, seed=seed, epoch=epoch)  # another draw, or an error

    def submit(self, token_ids: Tensor, rows: Tensor | None, wish: Wish) -> "Future[Answer]":
        """The recorded answer, or the live teacher's."""
        self.check_usable()
        self._check_wish(wish)
        if self._provenance is None:
            self._begin(wish)
        request = _Request.of(token_ids, rows, self._of_a_draw(wish))
        future: Future[Answer] = Future()
        self._answer(request, future)
        return future

    def close(self) -> None:
        """Seals what is not sealed yet. Raises RecordError if that fails."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            if self._failure is None:
                try:
                    self._worker.submit(self._seal).result()
                except RuntimeError:  # the interpreter ends, and the worker has done all it had to
                    self._seal()
        finally:
            self._worker.shutdown(cancel_futures=True)
            try:
                if self._failure is None:
                    self._seal()  # what came while the worker ended
            finally:
                self._shards.close()

    def make_wish(
        self, targets: str | TargetSpec | None, temperature: float, seed: int, epoch: int
    ) -> Wish:
        wish = super().make_wish(targets, temperature, seed, epoch)
        self._check_wish(wish)
        return wish

    def check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedClient(
                f"this record was opened in process {self._pid} and is used in its fork "
                f"{os.getpid()}: its thread is not there. Open it anew in the fork."
            )
        if self._closed:
            raise TeacherError(CLOSED)
        if self._failure is not None:
            raise self._failure

    # Opening.

    def _read(self, verify: bool) -> None:
        """Finds what is recorded, and puts aside what is damaged."""
        names = self._shards.names()
        damaged = list(self._not_whole(names)) if verify else []
        provenances: dict[tuple[tuple[str, ...], str, float], tuple[str, Provenance]] = {}
        fingerprints: dict[str, tuple[int, Provenance]] = {}
        """With the number of their rows."""
        tables: dict[str, None] = {}
        for name in names:
            if name in damaged:
                continue
            try:
                found = self._shards.provenance(name)
                identities = self._shards.identities(name)
                self._index.add(name, identities)
            except DAMAGE as error:
                self._check_damaged(name, error)
                damaged.append(name)
                continue
            key = (found.origin, found.spec, found.temperature)
            provenances.setdefault(key, (name, found))
            count, _ = fingerprints.get(found.fingerprint, (0, found))
            fingerprints[found.fingerprint] = count + len(identities), found
            tables = dict.fromkeys((*tables, *found.id_tables))
        if len(provenances) > 1:
            (first, one), (second, two) = list(provenances.values())[:2]
            raise IncompatibleTeacher(
                f"{self._folder.root} holds two records: {first} has {_described(one)}, {second} "
                f"has {_described(two)}. Put them into folders of their own."
            )
        if fingerprints:  # the one that most rows have stands for all
            most = max(fingerprints, key=lambda one: (fingerprints[one][0], one))
            self._provenance = replace(fingerprints[most][1], id_tables=tuple(tables))
        if len(fingerprints) > 1:
            logger.info(
                "%s was recorded under %d fingerprints of one teacher's weights: versions, dtype or "
                "device differed, and values may by rounding",
                *(self._folder.root, len(fingerprints)),
            )
        self._index.build()
        missing, unreadable = missing_shards(self._folder, names)
        for name in (*damaged, *unreadable):
            self._put_aside(name)
        for name in missing:
            logger.warning(
                "%s is missing from %s: its sequences are not replayed",
                # A manifest may name anything, also what no log can hold.
                *(name.encode("ascii", "backslashreplace").decode(), self._folder.root),
            )
        self._missing, self._lost = missing, [*missing, *damaged]

    def _not_whole(self, names: Sequence[str]) -> Iterator[str]:
        with ThreadPoolExecutor(VERIFY_THREADS) as threads:
            results = threads.map(self._shards.is_whole, names)
            shown = tqdm(results, desc="checking shards", total=len(names), leave=False, delay=2.0)
            for name, is_whole in zip(names, shown, strict=True):
                if not is_whole:
                    yield name

    def _check_damaged(self, name: str, error: BaseException) -> None:
        """Raises RecordError for a shard that is as it was sealed, and cannot be read all the same."""
        if self._shards.is_whole(name):
            raise RecordError(
                f"{name} in {self._folder.root} cannot be read, but is what was once sealed: {error}. "
                "A store that was away for a moment can be read again; a newer version may have "
                "written it."
            ) from error

    def _put_aside(self, name: str) -> None:
        """Names a damaged file, and moves it to quarantine if this record may write."""
        self.counters.quarantined += 1
        self._shards.forget(name)
        where = "left where it is, and not used"
        if self._writes:
            try:
                self._folder.quarantine(name)
                where = f"moved to {QUARANTINE}/"
            except OSError as error:
                where = f"not used, and cannot be moved to {QUARANTINE}/: {error}"
        logger.warning("%s in %s is damaged: %s", name, self._folder.root, where)

    def _check_same_teacher(self, info: teacher_pb2.TeacherInfo) -> None:
        """Of what was recorded, weights, tokenizer and codec have to be the live teacher's.

        The codec is compared by `check_compatible`. Versions of torch and transformers, dtype and
        device are in its fingerprint too, since they decide the last bits; a record does not lose its
        worth with them.
        """
        if self._provenance is None or self._provenance.fingerprint == info.teacher_fingerprint:
            return
        recorded, live = self._provenance.info(), origin_of(info)
        if self._provenance.origin == live:
            logger.info(
                "%s was recorded from the same weights of %s under another fingerprint (%s, now %s): "
                "versions, dtype or device differ, and new targets may by rounding",
                *(self._folder.root, info.model, recorded.teacher_fingerprint),
                info.teacher_fingerprint,
            )
            return
        differs = [
            what
            for what, one, other in (
                ("set of weights", recorded.weights_fingerprint, info.weights_fingerprint),
                ("tokenizer", recorded.tokenizer_fingerprint, info.tokenizer_fingerprint),
            )
            if one != other
        ]
        raise IncompatibleTeacher(
            f"{self._folder.root} was recorded from teacher {recorded.model} "
            f"{recorded.teacher_fingerprint}, the live one is {info.model} "
            f"{info.teacher_fingerprint}, with another {' and another '.join(differs) or 'fingerprint'}. "
            "Record it to another folder."
        )

    def _check_wish(self, wish: Wish) -> None:
        if self._provenance is None:
            return
        spec, temperature = self._provenance.spec, self._provenance.temperature
        if (str(wish.spec), wish.temperature) != (spec, temperature):
            raise InvalidRequest(
                f"{self._folder.root} holds {spec} at temperature {temperature}, asked for "
                f"{wish.spec} at temperature {wish.temperature}. Ask for what it holds, or record "
                "the other to another folder."
            )

    def _begin(self, wish: Wish) -> None:
        """The first request decides what a record holds."""
        self._provenance = Provenance(
            _teacher_of(self._info),
            str(wish.spec),
            wish.temperature,
            tuple(table.digest.hex() for table in self.id_tables),
        )
        self.default_targets = self._provenance.spec

    def _provenance_info(self) -> teacher_pb2.TeacherInfo:
        assert self._provenance is not None
        return self._provenance.info()

    def _read_id_tables(self) -> Sequence[IdTable]:
        tables = [] if self._fallback is None else list(self._fallback.id_tables)
        wanted = () if self._provenance is None else self._provenance.id_tables
        for digest in wanted:
            if any(table.digest.hex() == digest for table in tables):
                continue
            name = id_table_file(digest)
            try:
                table = IdTable.from_bytes(self._folder.read(name))
                if table.digest.hex() != digest:
                    raise CodecError("it is another table than its name says")
            except (OSError, CodecError) as error:
                raise RecordError(
                    f"{self._folder.root}/{name}, which its targets are coded with, cannot be "
                    f"read: {error}. Give the live teacher as fallback: it has the table too."
                ) from None
            tables.append(table)
        return tables

    # Answering.

    def _answer(self, request: _Request, future: "Future[Answer]") -> None:
        """Sees to it that the future gets the answer, from wherever it is."""
        with self._lock:
            entry = self._find(request)
            if entry is None and self._fallback is not None:
                new = Entry(request.wish.seed, request.wish.epoch, request.row_mask)
                new.asked = future
                self._fresh[request.key].append(new)
            else:
                new = None
            asked = entry.asked if entry is not None else None
        if new is not None:
            self._ask(request, new, future)
        elif entry is None:
            future.set_exception(self._not_recorded())
        elif asked is not None:
            # Asked for already: replayed as soon as it is here, or asked for again if it never is.
            asked.add_done_callback(lambda _: self._do(future, self._answer, request, future))
        else:
            self._wanted.append((request, entry, future))
            self._do(future, self._replay)

    def _request_of(self, token_ids: Any, seed: int, epoch: int) -> _Request:
        wish = self.make_wish(None, self.temperature, seed, epoch)
        return _Request.of(as_token_ids(token_ids, 0), None, self._of_a_draw(wish))

    def _num_draws(self, spec: TargetSpec) -> int:
        """Of each sequence; a record that was made with more of them keeps its number."""
        if not spec.needs_uniforms:
            return 1
        return max(self._draws, self._index.num_draws)

    def _of_a_draw(self, wish: Wish) -> Wish:
        """The same in the epoch whose draw it gets, whenever its sequences come first."""
        return replace(wish, epoch=wish.epoch % self._num_draws(wish.spec))

    def _find(self, request: _Request, *, any_draw: bool = False) -> Entry | None:
        """What answers a request; None if nothing does, or if another draw is to be asked for."""
        usable = {
            (entry.seed, entry.epoch): entry
            for entry in self._entries(request.key)
            if entry.row_mask is None or entry.row_mask == request.row_mask
        }
        exact = usable.get((request.wish.seed, request.wish.epoch))
        if exact is not None or not usable:
            return exact
        missing = len(usable) < self._num_draws(request.wish.spec)
        if missing and self._fallback is not None and not any_draw:
            return None
        return usable[sorted(usable)[request.wish.epoch % len(usable)]]

    def _entries(self, key: bytes) -> list[Entry]:
        return [*self._index.find(key), *self._fresh.get(key, ())]

    def _do(self, future: "Future[Answer]", work: Callable[..., None], *arguments: Any) -> None:
        """In the worker, for a future that somebody waits for, and who is told what goes wrong."""

        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                _fail(future, error)

        try:
            self._worker.submit(run)
        except RuntimeError:  # closed, or the interpreter ends
            if not future.cancel():  # it is being answered already
                _fail(future, TeacherError(CLOSED))

    def _resolve(
        self, request: _Request, future: "Future[Answer]", find: Callable[[], Answer]
    ) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            try:
                answer = find()
            except _Damaged as damaged:
                self._drop(damaged.shard)
                again: Future[Answer] = Future()
                again.add_done_callback(lambda done: _copy(done, future))
                self._answer(request, again)
                return
        except BaseException as error:  # whoever waits for the future is told
            _fail(future, error)
        else:
            future.set_result(answer)

    def _replay(self) -> None:
        """In the worker: resolves some of what is wanted, if the calls before have left any."""
        count = min(len(self._wanted), REPLAYED_TOGETHER)
        wanted = [self._wanted.popleft() for _ in range(count)]
        fetched = [
            (request, future, self._fetch(request, entry))
            for request, entry, future in wanted
            if not future.cancelled()
        ]
        for request, future, decoded in fetched:
            try:
                self._resolve(request, future, decoded)
            except BaseException as error:  # of one of them, not of those that were fetched with it
                _fail(future, error)

    def _fetch(self, request: _Request, entry: Entry) -> Callable[[], Answer]:
        """Reads; what it returns decodes, and raises what went wrong in either: _Damaged too."""
        payloads, shard = entry.payloads, entry.shard
        try:
            if not payloads:
                identity = request.key, entry.seed, entry.epoch
                payloads = tuple(self._shards.payloads(shard, entry.row, identity))
        except BaseException as error:  # whoever waits for this one is told, and nobody else
            return partial(self._raise_damage, shard, error)
        return partial(self._decode, request, entry.row_mask, shard, payloads)

    def _raise_damage(self, shard: str, error: BaseException) -> NoReturn:
        """Raises _Damaged if that is what the error comes from, else the error."""
        if not isinstance(error, DAMAGE):
            raise error
        self._check_damaged(shard, error)
        raise _Damaged(shard) from error

    def _decode(
        self, request: _Request, mask: bytes | None, shard: str, payloads: tuple[bytes, ...]
    ) -> Answer:
        try:
            targets = Targets.cat([decode(one, id_tables=self.id_tables) for one in payloads])
        except DAMAGE as error:  # a CodecError is a ValueError
            self._raise_damage(shard, error)
        num_rows = len(request.token_ids) - 1 if mask is None else _count_bits(mask)
        if targets.num_rows != num_rows:
            raise _Damaged(shard)
        if mask is None and request.row_mask is not None and request.rows is not None:
            targets = targets[request.rows]
            payloads = ()  # they are of more rows than these
        self.counters.replayed += 1
        return self._counted(Answer(targets, payloads), request)

    def _ask(self, request: _Request, entry: Entry, future: "Future[Answer]") -> None:
        """Asks the live teacher; the worker writes down what it answers."""
        assert self._fallback is not None
        wish = replace(request.wish, keep_payloads=True)
        try:
            live = self._fallback.submit(request.token_ids, request.rows, wish)
        except BaseException as error:  # the worker may be the one who asks
            self._remove(request.key, entry)
            future.set_exception(error)
            return
        self.counters.asked += 1

        def ended(future: Future[Answer]) -> None:
            if future.cancelled():
                live.cancel()
            if entry.asked is future:  # without an answer: whoever wants one asks again
                self._remove(request.key, entry)

        def answered(live: Future[Answer]) -> None:
            record = partial(self._record, request, entry, live)
            self._do(future, self._resolve, request, future, record)

        future.add_done_callback(ended)
        live.add_done_callback(answered)

    def _record(self, request: _Request, entry: Entry, live: "Future[Answer]") -> Answer:
        """Keeps a live answer to be sealed. Raises what the live teacher raised, RecordError."""
        answer = live.result()
        if not self._writes:
            self._remove(request.key, entry)
            return self._counted(answer, request)
        if self._writer is None:
            self._writer = self._begin_writing()
        ids = request.token_ids.numpy().astype(np.int32)
        row = Row(request.key, entry.seed, entry.epoch, entry.row_mask, ids, tuple(answer.payloads))
        if not self._unsealed:
            self._unsealed_since_s = time.monotonic()
        self._unsealed.append((row, entry))
        self._unsealed_nbytes += row.nbytes
        with self._lock:
            entry.payloads, entry.asked = row.payloads, None
        waited_s = time.monotonic() - self._unsealed_since_s
        if self._unsealed_nbytes >= self._seal_nbytes or waited_s >= self._seal_s:
            self._seal()
        return self._counted(answer, request)

    def _counted(self, answer: Answer, request: _Request) -> Answer:
        self.counters.rows += answer.targets.num_rows
        self.counters.payload_nbytes += sum(map(len, answer.payloads))
        return answer if request.wish.keep_payloads else Answer(answer.targets)

    def _begin_writing(self) -> Writer:
        """Raises RecordError where nothing can be written; then nothing works any more."""
        assert self._provenance is not None
        try:
            for table in self.id_tables:  # the same bytes, if it is there already
                self._folder.put(id_table_file(table.digest.hex()), table.to_bytes())
            # Of who answers now: the record may have been begun by another release of torch.
            provenance = replace(
                self._provenance,
                teacher=_teacher_of(self._info),
                id_tables=tuple(table.digest.hex() for table in self.id_tables),
            )
            return Writer(self._folder, provenance, self._lost)
        except RecordError as error:
            self._failure = error
            raise

    def _seal(self) -> None:
        """Writes what is not sealed into a shard. Raises RecordError; then nothing works any more."""
        if not self._unsealed:
            return
        if self._failure is not None:  # what failed first is what everybody is told
            raise self._failure
        assert self._writer is not None
        try:
            shard = self._writer.seal([row for row, _ in self._unsealed])
        except RecordError as error:
            self._failure = error
            raise
        with self._lock:
            for number, (_, entry) in enumerate(self._unsealed):
                entry.shard, entry.row, entry.payloads = shard, number, ()
        self._unsealed, self._unsealed_nbytes = [], 0

    def _drop(self, shard: str) -> None:
        """Forgets a shard that turned out to be damaged."""
        with self._lock:
            known = self._index.drop(shard)
            for key, entries in list(self._fresh.items()):
                kept = [entry for entry in entries if entry.shard != shard]
                known |= len(kept) < len(entries)
                self._fresh[key] = kept
        if known:
            self._put_aside(shard)
            self._lost.append(shard)

    def _remove(self, key: bytes, entry: Entry) -> None:
        with self._lock:
            self._fresh[key] = [one for one in self._fresh[key] if one is not entry]

    def _not_recorded(self) -> NotRecorded:
        where = f"this sequence is not in the record {self._folder.root}"
        if self._lost:
            return NotRecorded(
                f"{where}, which has {len(self)} left: {self._losses()}. Bring back the file, record "
                "again with student-trainer record, or give a live teacher as fallback."
            )
        return NotRecorded(
            f"{where}, which has {len(self)} of {self.info.model}. It was recorded from other text, "
            "with another tokenizer or cut differently, or these rows were not asked for. Record it "
            "with student-trainer record, or give a live teacher as fallback."
        )

    def _losses(self) -> str:
        """Which files are not there, and which are not whole."""
        damaged = [name for name in self._lost if name not in self._missing]
        said = [
            f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {what}"
            for names, what in ((self._missing, "missing"), (damaged, "damaged"))
            if names
        ]
        return ", ".join(said)


class _Damaged(Exception):
    """A shard is not what was sealed."""

    def __init__(self, shard: str) -> None:
        super().__init__(shard)
        self.shard = shard


def _teacher_of(info: teacher_pb2.TeacherInfo) -> dict[str, Any]:
    """What a record keeps of who the teacher is."""
    copy = teacher_pb2.TeacherInfo()
    copy.CopyFrom(info)
    for name in NOT_THE_TEACHERS:
        copy.ClearField(name)
    return MessageToDict(copy, preserving_proto_field_name=True)


def _described(found: Provenance) -> str:
    return f"{found.spec} at temperature {found.temperature} of teacher {found.fingerprint}"


def _fail(future: "Future[Answer]", error: BaseException) -> None:
    """Tells whoever waits, unless they have been told or have given up."""
    if future.running() or (not future.done() and future.set_running_or_notify_cancel()):
        future.set_exception(error)


def _copy(done: "Future[Answer]", future: "Future[Answer]") -> None:
    error = TeacherError(CLOSED) if done.cancelled() else done.exception()
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())


def _count_bits(mask: bytes) -> int:
    return int.from_bytes(mask, "little").bit_count()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
