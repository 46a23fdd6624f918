"""Defines Recorded: a teacher that replays targets which were recorded before.

With a live teacher as fallback, missing sequences are asked for and recorded on the way, so a
record grows where it is used. One thread reads, decodes and writes; callers' threads look up and
wait.
"""

import atexit
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from logit_codec import HiddenTargets, Targets, TargetSpec, TeacherHead
from protos import teacher_pb2
from student_trainer.errors import ForkedClient, RecordError, TeacherError
from student_trainer.record.catalog import Catalog, read_id_tables
from student_trainer.record.folder import Folder
from student_trainer.record.index import Entry
from student_trainer.record.provenance import NO_TARGETS, Provenance
from student_trainer.record.replay import Replayer
from student_trainer.record.request import RecordCounters, Request
from student_trainer.record.sealer import Sealer
from student_trainer.record.shards import DamagedShard
from student_trainer.record.worker import CLOSED, Worker, fail, resolve
from student_trainer.teachers.compatibility import check_compatible
from student_trainer.teachers.head_cache import load_head
from student_trainer.teachers.layout import as_given_ids, as_token_ids
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.several import Teachers
from student_trainer.teachers.teacher import Teacher

SEAL_NBYTES = 64 << 20
"""Size of a shard's content, which is held in memory until it is sealed."""
SEAL_S = 60.0
"""Age at which rows are sealed with the next answer; a kill loses no more than these."""


class Recorded(Teacher):
    """A folder of recorded targets as a teacher.

    folder: a path, or a URL that fsspec knows. fallback: a live teacher for missing sequences; its
    answers are written to the folder unless `write` is off. tokenizer: the student's; a record of
    another vocabulary is refused. draws: for `sampled` targets, how many draws of a sequence to
    record, in epochs 0 to draws - 1; later epochs take them in turn. verify: read every shard whole
    and compare its digest before anything is replayed (default: if the folder is local; every read
    is checked anyway). Raises RecordError if there is nothing to replay, IncompatibleTeacher for
    another teacher.

    A sequence is found by its ids. A request gets the draw of its seed and of its epoch modulo the
    record's number of draws. If that one was not recorded, it gets another one, chosen by its
    epoch, unless a live teacher can be asked and there are fewer than that number.
    """

    has_one_kind = True
    who_writes = "its live teacher, and record what it writes with student-trainer generate"

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
        self._head: TeacherHead | None = None
        if isinstance(fallback, Teachers):
            raise ValueError(
                "a record is of one teacher: give each of several teachers a record of its own, "
                "Teachers({name: Recorded(folder_of_it, teacher), ...}, column=...)"
            )
        self._fallback = fallback
        self.tokenizer = tokenizer or getattr(fallback, "tokenizer", None)
        files = Folder(folder)
        writes = write and fallback is not None
        self._catalog = Catalog(
            files,
            self.counters,
            draws=draws,
            is_live=fallback is not None,
            writes=writes,
            verify=files.is_local if verify is None else verify,
        )
        self._info = _check_teacher(self._catalog, fallback, tokenizer)
        if self._catalog.provenance is not None:
            self.default_targets = self._catalog.provenance.spec
        self.id_tables = read_id_tables(files, self._catalog.provenance, fallback)
        self._worker = Worker()
        self._replayer = Replayer(
            self._catalog, self._worker, self.id_tables, self.counters, self._answer
        )
        self._sealer = Sealer(
            self._catalog,
            self._info,
            self.id_tables,
            writes=writes,
            seal_nbytes=seal_nbytes,
            seal_s=seal_s,
        )
        atexit.register(self.close)

    def __len__(self) -> int:
        """Sequences and draws that can be replayed now; after `close`, those that are sealed."""
        return len(self._catalog)

    def has(
        self,
        token_ids: Any,
        seed: int = 0,
        epoch: int = 0,
        rows: Tensor | None = None,
        *,
        given_ids: Any = None,
    ) -> bool:
        """Whether a sequence would be replayed without asking the live teacher.

        rows: (N,) int64, the wanted ones; None for all. given_ids: as for `stream`, of one sequence.
        """
        if self._catalog.provenance is None:
            return False
        request = self._make_request(token_ids, seed, epoch, rows, given_ids)
        return self._catalog.find(request) is not None

    @property
    def info(self) -> teacher_pb2.TeacherInfo:
        """Describes the live teacher, or else the one that was recorded."""
        return self._info

    @property
    def fallback(self) -> Teacher | None:
        """The live teacher that is asked for missing sequences."""
        return self._fallback

    @property
    def temperature(self) -> float:
        """Temperature of the recorded targets; 1.0 while there are none."""
        provenance = self._catalog.provenance
        return 1.0 if provenance is None else provenance.temperature

    def get(
        self, token_ids: Any, *, seed: int = 0, epoch: int = 0, given_ids: Any = None
    ) -> Targets:
        """Returns the recorded targets of all rows of one sequence.

        given_ids: those that were recorded, as for `stream`, of one sequence. Hidden states come with the
        head if this host has it. Raises NotRecorded if there are none; the live teacher is not asked.
        """
        self.check_usable()
        request = self._make_request(token_ids, seed, epoch, None, given_ids)
        while True:
            entry = self._catalog.find(request, any_draw=True)
            if entry is None or entry.pending is not None:
                raise self._catalog.not_recorded(self._info.model)
            try:
                answer = self._worker.submit(self._replayer.read, request, entry)
                return _with_head(answer.result().targets, self.head)
            except DamagedShard as damaged:  # another shard may have another draw
                self._worker.submit(self._catalog.drop, damaged.shard).result()

    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        """Asks for one sequence: the recorded answer, or the live teacher's."""
        self.check_usable()
        if self._catalog.provenance is None:
            self._begin(options)
        self._catalog.check_options(options)
        piece.check(options.spec)
        request = Request.of(piece, self._catalog.assign_draw(options))
        future: Future[Answer] = Future()
        self._answer(request, future)
        return future

    def head(self) -> TeacherHead:
        """Returns the recorded teacher's vocabulary head: the live teacher's, or the one on disk.

        Raises TeacherError if this host has not fetched it."""
        if self._fallback is not None:
            return self._fallback.head()
        if self._head is None:
            what = f"the record in {self._catalog.folder.root}"
            self._head = load_head(self._info.head_fingerprint, None, what)
        return self._head

    def close(self) -> None:
        """Seals what is not sealed yet. Raises RecordError if that fails."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            self._worker.finish(self._sealer.seal_rest)
        finally:
            try:
                self._sealer.seal_rest()  # what came while the thread ended
            finally:
                self._catalog.shards.close()

    def make_options(
        self, targets: str | TargetSpec | None, temperature: float, seed: int, epoch: int
    ) -> ScoreOptions:
        options = super().make_options(targets, temperature, seed, epoch)
        self._catalog.check_options(options)
        return options

    def check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedClient(
                f"this record was opened in process {self._pid} and is used in its fork "
                f"{os.getpid()}, which lacks its thread. Open it again in the fork."
            )
        if self._closed:
            raise TeacherError(CLOSED)
        if self._sealer.failure is not None:
            raise self._sealer.failure

    def _begin(self, options: ScoreOptions) -> None:
        """Lets the first request decide what the record holds."""
        digests = [table.digest for table in self.id_tables]
        self._catalog.begin(
            Provenance.of(self._info, str(options.spec), options.temperature, digests)
        )
        assert self._catalog.provenance is not None
        self.default_targets = self._catalog.provenance.spec

    def _make_request(
        self, token_ids: Any, seed: int, epoch: int, rows: Tensor | None, given_ids: Any
    ) -> Request:
        options = self.make_options(None, self.temperature, seed, epoch)
        given = as_given_ids(given_ids, "given_ids")
        piece = Piece(as_token_ids(token_ids, "sequence 0"), rows, given)
        piece.check(options.spec)
        return Request.of(piece, self._catalog.assign_draw(options))

    def _answer(self, request: Request, future: "Future[Answer]") -> None:
        """Makes sure that the future gets an answer, from the record or the live teacher."""
        entry, is_new = self._catalog.find_or_add(request, future)
        if entry is None:
            fail(future, self._catalog.not_recorded(self._info.model))
        elif is_new:
            self._ask(request, entry, future)
        elif (pending := entry.pending) is not None:
            # Another request awaits it: replayed once it is here, asked for again if it never comes.
            pending.add_done_callback(
                lambda _: self._worker.run_for(future, self._answer, request, future)
            )
        else:
            self._replayer.replay(request, entry, future)

    def _ask(self, request: Request, entry: Entry, future: "Future[Answer]") -> None:
        """Asks the live teacher; the record's thread keeps its answer."""
        assert self._fallback is not None
        options = replace(request.options, keep_payloads=True)
        try:
            live = self._fallback.submit(request.piece, options)
        except BaseException as error:  # the record's thread may ask, which has no caller
            self._catalog.remove(request.key, entry)
            fail(future, error)
            return
        self.counters.asked += 1

        def end(future: Future[Answer]) -> None:
            if future.cancelled():
                live.cancel()
            # Still pending: no answer came, so the next request must ask again.
            if entry.pending is future:
                self._catalog.remove(request.key, entry)

        def receive(live: Future[Answer]) -> None:
            keep = partial(self._keep, request, entry, live)
            # Called in a thread of the live teacher, which must not wait for a disk.
            self._worker.run_for(future, resolve, future, keep)

        future.add_done_callback(end)
        live.add_done_callback(receive)

    def _keep(self, request: Request, entry: Entry, live: "Future[Answer]") -> Answer:
        """Records a live answer. Raises the live teacher's error, or RecordError."""
        answer = live.result()
        self._sealer.keep(request, entry, tuple(answer.payloads))
        return self.counters.hand_out(answer, request)


def _check_teacher(
    catalog: Catalog, fallback: Teacher | None, tokenizer: Any
) -> teacher_pb2.TeacherInfo:
    """Returns the teacher's description once record, live teacher and student fit together."""
    recorded, root = catalog.provenance, catalog.folder.root
    if recorded is not None and recorded.spec == NO_TARGETS:
        raise RecordError(
            f"{root} holds texts without targets: train on them with --data {root} --targets none, or "
            "have others written with targets (student-trainer generate --targets sampled)"
        )
    if fallback is not None:
        info = fallback.info
        if recorded is not None:
            recorded.check_same_teacher(root, info)
    elif recorded is not None:
        info = recorded.info()
    else:
        losses = f"; {catalog.describe_losses()}" if catalog.lost else ""
        raise RecordError(
            f"there is no record in {root}{losses}. Make one with student-trainer record, or "
            "give a live teacher as fallback."
        )
    check_compatible(info, tokenizer)
    if recorded is not None:
        check_compatible(recorded.info(), None)
    return info


def _with_head(targets: Targets, head: Callable[[], TeacherHead]) -> Targets:
    """Adds the head to hidden states, if it is at hand; whoever needs it is told if it is not."""
    if isinstance(targets, HiddenTargets):
        with contextlib.suppress(TeacherError):
            return targets.with_head(head())
    return targets
