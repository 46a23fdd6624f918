"""Runs a teacher in this process, with the interface and the bytes of a served one.

This is the one place where this package uses `teacher_server`, and only when a LocalTeacher is made.
"""

from concurrent.futures import Future
from typing import Any

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
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.teacher import NO_HEAD, Teacher

PART_NBYTES = 1 << 20
"""The size of the service's parts; where a sequence is split does not change what is decoded."""


class LocalTeacher(Teacher):
    """Serves as a teacher with a causal LM of transformers; for tests, small runs and one GPU.

    Targets go through the same encoder and decoder as those of a service.
    """

    default_ahead = 1  # what is scored ahead is scored in the caller's own thread
    default_look_ahead = 1

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        from teacher_server.engine.engine import Engine
        from teacher_server.engine.loading import prepare

        self.tokenizer = tokenizer
        self._engine = Engine(prepare(model, tokenizer))
        self._model = self._engine.model
        self._info = describe_model(
            self._model,
            service_id="local",
            max_sequence_tokens=self._model.max_sequence_tokens,
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
            (scored,) = self._engine.score([request])
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        parts = encode_parts(scored, spec, max_nbytes=PART_NBYTES)
        payloads = [payload for _, _, payload in parts]
        targets = decode_parts(payloads, given_ids=given)
        future.set_result(Answer(targets, tuple(payloads) if options.keep_payloads else ()))
        return future
