"""LocalTeacher: the same interface and the same bytes as a served teacher, in this process.

The one place where this package uses `teacher_server`, and only when a LocalTeacher is made.
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
from student_trainer.teachers.request import Answer, Wish
from student_trainer.teachers.teacher import Teacher

PART_NBYTES = 1 << 20
"""As large as the service's parts; where a sequence is split does not change what is decoded."""


class LocalTeacher(Teacher):
    """A causal LM of transformers as a teacher; for tests, small runs and one GPU.

    Targets go through the same encoder and decoder as those of a service.
    """

    default_ahead = 1  # what is scored ahead is scored in the caller's own thread
    default_look_ahead = 1

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        from teacher_server.engine.head import VocabularyHead
        from teacher_server.engine.loading import prepare

        self._model = prepare(model, tokenizer)
        self._head = VocabularyHead(self._model)
        self._info = describe_model(
            self._model,
            service_id="local",
            max_sequence_tokens=self._model.max_sequence_tokens,
            limits=teacher_pb2.Limits(max_top_k=self._model.effective_vocab_size),
        )

    @property
    def info(self) -> teacher_pb2.TeacherInfo:
        """What a service of this model would say of it."""
        return self._info

    def check_usable(self) -> None:
        """Always."""

    def close(self) -> None:
        """The model is its owner's; there is nothing to end."""

    def submit(self, token_ids: Tensor, rows: Tensor | None, wish: Wish) -> "Future[Answer]":
        from teacher_server.engine.batch import WantedRows

        future: Future[Answer] = Future()
        longest, largest = self._model.max_sequence_tokens, self._model.effective_vocab_size
        if len(token_ids) > longest:
            raise InvalidRequest(f"a sequence may have {longest} tokens, got {len(token_ids)}")
        if int(token_ids.max()) >= largest:
            raise InvalidRequest(f"ids are 0 to {largest - 1}, got {int(token_ids.max())}")
        if rows is None:
            rows = torch.arange(len(token_ids) - 1)
        draws = None
        if wish.spec.needs_uniforms:
            draws = uniforms(wish.seed, wish.epoch, ids_digest(token_ids), rows)
        wanted = WantedRows(token_ids, rows, wish.spec, wish.temperature, draws)
        try:
            (scored,), _ = self._head.score([wanted])
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        parts = encode_parts(scored, wish.spec, max_nbytes=PART_NBYTES)
        payloads = [payload for _, _, payload in parts]
        targets = Targets.cat([decode(payload) for payload in payloads])
        future.set_result(Answer(targets, tuple(payloads) if wish.keep_payloads else ()))
        return future
