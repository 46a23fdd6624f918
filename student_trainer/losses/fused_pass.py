"""Walks over the rows of the fused loss a chunk at a time: logits, loss and gradients of each.

Letters: R rows, C rows of one chunk, D hidden size, V vocabulary.
"""

import math

import torch
from torch import Tensor

from student_trainer.losses.fused_chunk import Buffers, Chunk, Problem

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

CHUNK_BYTES = {"cpu": 96 << 20}
"""Of the (C, V) buffers. Small enough not to matter; with half of it the head and its gradient are
read twice as often, and a step takes a sixth longer."""
CHUNK_BYTES_ELSEWHERE = 512 << 20
"""A GPU would wait for the head's weights with fewer rows."""


class FusedPass:
    """Walks over all chunks once: the losses of the rows, and the gradients of their sum."""

    def __init__(
        self,
        problem: Problem,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        weight_R: Tensor | None,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        """weight_R: of each row in the sum; None for 1. wanted: which inputs need a gradient."""
        self._problem, self._hidden, self._weight_R = problem, hidden, weight_R
        self._low = hidden.dtype
        self._high = torch.float64 if self._low == torch.float64 else torch.float32
        self._head = head[: problem.width]
        self._bias = None if bias is None else bias[: problem.width]
        self._buffers = Buffers(hidden.device)
        self._differentiate = any(wanted)
        self._loss_R = hidden.new_zeros(len(hidden), dtype=self._high)
        # Sums of many chunks: float32 at least, also where the inputs have 16 bits.
        self._grad_hidden, self._grad_head, self._grad_bias = (
            value.new_zeros(value.shape, dtype=self._high) if want and value is not None else None
            for value, want in zip((hidden, head, bias), wanted, strict=True)
        )

    def run(self) -> tuple[Tensor, Gradients]:
        """Returns (R,) losses, and the gradients of their weighted sum that are wanted."""
        problem = self._problem
        count = len(self._hidden) if problem.rows is None else len(problem.rows)
        size = self._chunk_rows(count)
        with torch.autocast(self._hidden.device.type, enabled=False):
            for start in range(0, count, size):
                where = slice(start, min(start + size, count))
                self._add_chunk(where if problem.rows is None else problem.rows[where])
        return self._loss_R, (self._grad_hidden, self._grad_head, self._grad_bias)

    def _add_chunk(self, where: slice | Tensor) -> None:
        hidden_CD = self._hidden[where]
        units_CV = self._project(hidden_CD)
        statistics = self._problem.statistics
        if statistics is not None:
            statistics.best[where] = units_CV.argmax(1)
        weight_C1 = None if self._weight_R is None else self._weight_R[where][:, None]
        chunk = Chunk(self._problem, where, units_CV, weight_C1, self._buffers, self._differentiate)
        self._loss_R[where], gradient_CV = chunk.solve()
        if gradient_CV is not None:
            self._add_gradient(where, hidden_CD, gradient_CV)

    def _project(self, hidden_CD: Tensor) -> Tensor:
        """Computes (C, V) logits, in units of the softcap if there is one."""
        problem, head, bias = self._problem, self._head, self._bias
        scale = problem.logit_scale / (problem.softcap or 1.0)
        shape = (len(hidden_CD), len(head))
        units_CV = self._buffers.get("units", shape, self._high)
        if self._low == self._high:
            if bias is None:
                torch.mm(hidden_CD * scale, head.T, out=units_CV)
            else:
                torch.addmm(bias, hidden_CD, head.T, beta=scale, alpha=scale, out=units_CV)
        else:
            narrow = self._buffers.get("narrow", shape, self._low)
            if bias is None:
                torch.mm(hidden_CD, head.T, out=narrow)
            else:
                torch.addmm(bias, hidden_CD, head.T, out=narrow)
            units_CV.copy_(narrow)
            if scale != 1.0:
                units_CV.mul_(scale)
        return units_CV if problem.softcap is None else units_CV.tanh_()

    def _add_gradient(self, where: slice | Tensor, hidden_CD: Tensor, gradient_CV: Tensor) -> None:
        """Carries the gradient of the chunk's logits on to hidden states, head and bias."""
        width, scale = self._problem.width, self._problem.logit_scale
        if self._grad_bias is not None:
            self._grad_bias[:width].add_(gradient_CV.sum(0), alpha=scale)
        if self._low != self._high:
            narrow = self._buffers.get("narrow", gradient_CV.shape, self._low)
            gradient_CV = narrow.copy_(gradient_CV)
        if self._grad_hidden is not None:
            product = torch.mm(gradient_CV, self._head).to(self._high)
            self._grad_hidden[where] = product * scale
        if self._grad_head is None:
            return
        if self._low == self._high:
            self._grad_head[:width].addmm_(gradient_CV.T, hidden_CD, alpha=scale)
        else:
            product = self._buffers.get("head", (width, hidden_CD.shape[1]), self._low)
            torch.mm(gradient_CV.T, hidden_CD, out=product)
            self._grad_head[:width].add_(product, alpha=scale)

    def _chunk_rows(self, count: int) -> int:
        """Returns the rows of a chunk: all have the same number, except for the last."""
        problem, limit = self._problem, self._problem.chunk_rows
        if limit is None:
            nbytes = CHUNK_BYTES.get(self._hidden.device.type, CHUNK_BYTES_ELSEWHERE)
            row_nbytes = problem.width * self._high.itemsize * problem.num_buffers
            limit = max(1, nbytes // row_nbytes)
        return math.ceil(count / math.ceil(count / limit)) if count else 1
