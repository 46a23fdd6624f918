"""Connects to a served teacher and hands its targets to the trainer.

One background thread per process owns the asyncio loop and every gRPC object (`io_thread.py`); the
caller's thread pulls sequences, submits them and waits for futures.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, BinaryIO

from logit_codec import TeacherHead
from logitstream.connection import Address, Connection, Pem
from logitstream.messages import fill_given_ids, fill_targets
from protos import teacher_pb2
from student_trainer.client.counters import Counters
from student_trainer.client.io_thread import IoThread
from student_trainer.client.pending import Pending
from student_trainer.client.remote_writer import RemoteWriter
from student_trainer.client.session import Session
from student_trainer.errors import ForkedClient, IncompatibleTeacher, TeacherError
from student_trainer.teachers.compatibility import check_compatible
from student_trainer.teachers.generation import GenerateOptions
from student_trainer.teachers.head_cache import load_head
from student_trainer.teachers.request import Answer, Piece, ScoreOptions, row_mask
from student_trainer.teachers.teacher import NO_HEAD, Teacher

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
"""How long `connect` waits for the first answer, if the patience allows it."""


def connect(
    address: Address,
    *,
    tokenizer: Any = None,
    token: str | None = None,
    ca: Pem | None = None,
    cert: Pem | None = None,
    key: Pem | None = None,
    patience_s: float = 300.0,
) -> "RemoteTeacher":
    """Connects to the teacher that is served at `address`.

    address: host:port, several of one service, or the path of a connection file (*.toml) from the
    operator. tokenizer: the student's, from transformers or tokenizers; a teacher with another
    vocabulary is refused. token: by default the environment variable TEACHER_TOKEN, or the one that
    the connection file names. ca: the authority that signed the service's certificate, as PEM or its
    path, or "public" for the public ones; without it (and TEACHER_CA) the connection is plain text.
    cert, key: a client certificate, by default TEACHER_CERT and TEACHER_KEY. patience_s: how long to
    wait in all while no replica answers. The first answer is waited for at most 10 s, and not at all
    where waiting cannot help, as with a certificate of another authority.
    Raises TeacherUnavailable, IncompatibleTeacher or AccessDenied; ValueError or OSError for
    arguments that cannot be used.
    """
    connection = Connection.to(address, token=token, ca=ca, cert=cert, key=key)
    connection.warn()
    return RemoteTeacher(connection, tokenizer=tokenizer, patience_s=patience_s)


class RemoteTeacher(Teacher):
    """Gives the targets of a served teacher; `connect` makes one, `with` or `close()` ends it."""

    is_remote = True

    def __init__(self, connection: Connection, *, tokenizer: Any, patience_s: float) -> None:
        self._pid = os.getpid()
        self._io = IoThread.shared()
        self._closed = False
        self._head: TeacherHead | None = None
        self.tokenizer = tokenizer
        self._session = Session(connection, patience_s)
        try:
            self._info = self._io.run(self._session.open(min(CONNECT_S, patience_s)))
            self.id_tables = self._session.id_tables
            check_compatible(self._info, tokenizer)
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> teacher_pb2.TeacherInfo:
        """What the service answered to Describe at connect."""
        return self._info

    @property
    def counters(self) -> Counters:
        """What was sent, received and resent so far."""
        return self._session.counters

    @property
    def replicas(self) -> list[str]:
        """The addresses of the replicas that requests are spread over now."""
        return self._session.replicas

    def close(self) -> None:
        """Ends the stream and the connection; requests in flight are dropped."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._io.run(self._session.close())

    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        """Sends one sequence; returns at once."""
        self.check_usable()
        piece.check(options.spec)
        request = _request(piece, options)
        request.session_id = self._session.session_id
        request.teacher_fingerprint = self._info.teacher_fingerprint
        if self._session.id_tables:
            request.targets.id_table = self._session.id_tables[0].digest
        pending = Pending(
            request,
            piece.num_rows,
            given_ids=piece.given_ids,
            keep_payloads=options.keep_payloads,
        )
        self._io.call(self._session.submit, pending)
        return pending.future

    def head(self) -> TeacherHead:
        """Returns the teacher's vocabulary head: fetched once, then kept on disk.

        Raises AccessDenied without the scope `hidden`, IncompatibleTeacher if the teacher has no such
        head, and what `load_head` raises.
        """
        self.check_usable()
        fingerprint = self._info.head_fingerprint
        if not fingerprint:
            raise IncompatibleTeacher(
                f"{self._info.model} has no vocabulary head that clients can use: {NO_HEAD}"
            )
        if self._head is None:

            def fetch(file: BinaryIO) -> None:
                self._io.run(self._session.fetch_head(fingerprint, file))

            self._head = load_head(fingerprint, fetch, "the teacher")
        return self._head

    def _writer_maker(self, options: GenerateOptions) -> Callable[[], RemoteWriter]:
        head = self.head() if options.spec is not None and options.spec.needs_hidden else None
        return lambda: RemoteWriter(
            self._io, self._session, options, head, self._info, self.check_usable
        )

    def check_usable(self) -> None:
        """Raises TeacherError if this teacher is closed or belongs to another process."""
        if os.getpid() != self._pid:
            raise ForkedClient(
                f"this teacher was connected in process {self._pid} and is used in its fork "
                f"{os.getpid()}: gRPC does not survive a fork. Iterate over the teacher in the "
                "main process, around the DataLoader instead of inside its workers."
            )
        if self._closed:
            raise TeacherError("this teacher is closed; connect again to use it")


def _request(piece: Piece, options: ScoreOptions) -> teacher_pb2.ScoreRequest:
    """Makes the message for one sequence."""
    ids = piece.token_ids.numpy().astype("<i4")
    level = teacher_pb2.LEVEL_INTERACTIVE if options.interactive else teacher_pb2.LEVEL_TRAINING
    request = teacher_pb2.ScoreRequest(
        token_ids=ids.tobytes(),
        lengths=[len(ids)],
        temperature=options.temperature,
        seed=options.seed,
        epoch=options.epoch,
        level=level,
    )
    fill_targets(request.targets, options.spec)
    mask = row_mask(piece.rows, len(ids) - 1)
    if mask is not None:
        request.row_mask = mask
    if piece.given_ids is not None:
        fill_given_ids(request, piece.given_ids)
    return request
