"""Runs a teacher in this process, with the interface and the bytes of a served one.

This is the one place where this package uses `teacher_server`, and only when a LocalTeacher is made.
"""

from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from logit_codec import (
    Targets,
    decode,
    encode_parts,
    ids_digest,
    uniforms,
)
from logitstream.messages import describe_model
from protos import teacher_pb2
from student_trainer.errors import InvalidRequest
from student_trainer.teachers.request import Answer, ScoreOptions
from student_trainer.teachers.teacher import Teacher

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

    def close(self) -> None:
        """Does nothing: the model belongs to the caller."""

    def submit(
        self, token_ids: Tensor, rows: Tensor | None, options: ScoreOptions
    ) -> "Future[Answer]":
        """Scores the sequence at once, in the caller's thread."""
        from teacher_server.engine.batch import RowRequest

        future: Future[Answer] = Future()
        longest, largest = self._model.max_sequence_tokens, self._model.effective_vocab_size
        if len(token_ids) > longest:
            raise InvalidRequest(f"a sequence may have {longest} tokens, got {len(token_ids)}")
        if int(token_ids.max()) >= largest:
            raise InvalidRequest(f"ids are 0 to {largest - 1}, got {int(token_ids.max())}")
        if rows is None:
            rows = torch.arange(len(token_ids) - 1)
        draws = None
        if options.spec.needs_uniforms:
            draws = uniforms(options.seed, options.epoch, ids_digest(token_ids), rows)
        request = RowRequest(token_ids, rows, options.spec, options.temperature, draws)
        try:
            (scored,) = self._engine.score([request])
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        parts = encode_parts(scored, options.spec, max_nbytes=PART_NBYTES)
        payloads = [payload for _, _, payload in parts]
        targets = Targets.cat([decode(payload) for payload in payloads])
        future.set_result(Answer(targets, tuple(payloads) if options.keep_payloads else ()))
        return future
