"""Runs a teacher in this process, with the interface and the bytes of a served one.

This is the one place where this package uses `teacher_server`, and only when a LocalTeacher is made.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from logit_codec import (
    TeacherHead,
    decode_parts,
    encode_parts,
    ids_digest,
    uniforms,
)
from logitstream.messages import describe_model
from protos import teacher_pb2
from student_trainer.errors import IncompatibleTeacher, InvalidRequest
from student_trainer.teachers.generation import GenerateOptions
from student_trainer.teachers.local_writer import PART_NBYTES, LocalWriter
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.teacher import NO_HEAD, Teacher

if TYPE_CHECKING:
    from teacher_server.engine.generate import Generator


class LocalTeacher(Teacher):
    """Serves as a teacher with a causal LM of transformers; for tests, small runs and one GPU.

    Targets go through the same encoder and decoder as those of a service.
    """

    default_ahead = 1  # what is scored ahead is scored in the caller's own thread
    default_look_ahead = 1

    def __init__(self, model: Any, tokenizer: Any = None, *, keys_mib: int = 1024) -> None:
        """keys_mib: bound of the memory for keys and values of the texts that `generate` writes, which
        is taken when that is first used."""
        from teacher_server.engine.engine import Engine
        from teacher_server.engine.generate import CannotGenerate, find_max_tokens
        from teacher_server.engine.loading import prepare

        self.tokenizer = tokenizer
        self._engine = Engine(prepare(model, tokenizer))
        self._model = self._engine.model
        self._keys_nbytes = keys_mib << 20
        self._generator: Generator | None = None
        self._lock = threading.Lock()
        """One thread computes at a time."""
        try:
            most = find_max_tokens(self._model, self._keys_nbytes)
        except CannotGenerate:
            most = 0
        self._info = describe_model(
            self._model,
            service_id="local",
            max_sequence_tokens=self._model.max_sequence_tokens,
            max_generation_tokens=most,
            limits=teacher_pb2.Limits(max_top_k=self._model.effective_vocab_size),
        )

    @property
    def info(self) -> teacher_pb2.TeacherInfo:
        """How a service of this model would describe itself."""
        return self._info

    def check_usable(self) -> None:
        """Never raises: a model in this process is always usable."""

    def head(self) -> TeacherHead:
        """Returns the model's own head. Raises IncompatibleTeacher if it is not a plain product."""
        if self._model.client_head is None:
            raise IncompatibleTeacher(f"{self._model.architecture} has no such head: {NO_HEAD}")
        return self._model.client_head

    def close(self) -> None:
        """Does nothing: the model belongs to the caller."""

    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        """Scores the sequence at once, in the caller's thread."""
        from teacher_server.engine.batch import RowRequest

        future: Future[Answer] = Future()
        token_ids, given = piece.token_ids, piece.given_ids
        piece.check(options.spec)
        longest, largest = self._model.max_sequence_tokens, self._model.effective_vocab_size
        if len(token_ids) > longest:
            raise InvalidRequest(f"a sequence may have {longest} tokens, got {len(token_ids)}")
        if int(token_ids.max()) >= largest:
            raise InvalidRequest(f"ids are 0 to {largest - 1}, got {int(token_ids.max())}")
        rows = torch.arange(len(token_ids) - 1) if piece.rows is None else piece.rows
        draws = None
        if options.spec.needs_uniforms:
            draws = uniforms(options.seed, options.epoch, ids_digest(token_ids), rows)
        try:
            spec = self._model.complete(options.spec)
            padded = None
            if given is not None:
                if int(given.token_ids.max()) >= largest:
                    raise ValueError(f"given ids are 0 to {largest - 1}")
                spec, padded = spec.for_rows(given.most), given.padded()
            request = RowRequest(token_ids, rows, spec, options.temperature, draws, padded)
            with self._lock:
                (scored,) = self._engine.score([request])
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        parts = encode_parts(scored, spec, max_nbytes=PART_NBYTES)
        payloads = [payload for _, _, payload in parts]
        targets = decode_parts(payloads, given_ids=given)
        future.set_result(Answer(targets, tuple(payloads) if options.keep_payloads else ()))
        return future

    def _writer_maker(self, options: GenerateOptions) -> Callable[[], LocalWriter]:
        from teacher_server.engine.stops import StopRule

        stop_ids = set(options.stop_ids)
        if not options.ignore_teacher_stop_ids:
            stop_ids.update(self._model.stop_ids)
        try:
            spec = None if options.spec is None else self._model.complete(options.spec)
            stop_rule = StopRule(
                stop_ids, options.stop_strings, options.max_new_tokens, self._model.tokenizer
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        head = self.head() if spec is not None and spec.needs_hidden else None

        def make() -> LocalWriter:
            with self._lock:
                if self._generator is None:
                    self._generator = self._engine.open_generation(self._keys_nbytes)
            return LocalWriter(
                self._generator,
                options,
                spec,
                stop_rule,
                head,
                self._compute,
                self._engine.pack_tokens,
            )

        return make

    @contextlib.contextmanager
    def _compute(self) -> Iterator[None]:
        """Lets one thread compute at a time."""
        with self._lock, self._engine.device.queue():
            yield
