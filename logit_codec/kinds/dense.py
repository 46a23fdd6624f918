"""Defines the kind `dense`: the logprob of every id.

Letters: R rows, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.blocks import RowMasses
from logit_codec.errors import CodecError
from logit_codec.header import NO_IDS, Header
from logit_codec.id_table import IdTable
from logit_codec.inputs import RowInputs
from logit_codec.kinds.base import Content, FullCells, Kind
from logit_codec.planes import PlaneReader, RowCheck, raw_words, read_row_fields
from logit_codec.spec import OptionText, TargetSpec
from logit_codec.targets import Targets, expect_tensor, first_dimension


@dataclass(frozen=True, slots=True)
class DenseSpec(TargetSpec):
    """Asks for the logprob of every id. Raises ValueError for values out of range."""

    kind: ClassVar[str] = "dense"

    bits: int = 32
    """32: float32; 16: bfloat16 (8 significant bits: off by up to 0.125 down to -64 nats)."""

    def __post_init__(self) -> None:
        if self.bits not in (16, 32):
            raise ValueError(
                f"bits must be 32 (float32) or 16 (bfloat16) for dense, got {self.bits}"
            )

    def max_row_nbytes(self, vocab_size: int) -> float:
        return vocab_size * self.bits / 8 + TargetSpec.max_row_nbytes(self, vocab_size)

    def max_decoded_row_nbytes(self, vocab_size: int) -> float:
        return TargetSpec.max_decoded_row_nbytes(self, vocab_size) + vocab_size * self.bits // 8

    def scratch_row_nbytes(self, vocab_size: int) -> int:
        return 12 * vocab_size

    def select(self, masses: RowMasses | None, inputs: RowInputs) -> dict[str, Tensor]:
        assert masses is not None
        peak_R1, temperature = masses.peak_R[:, None], masses.temperature
        logits = masses.logits if masses.part is None else masses.part.whole(masses.logits)
        logprobs_RV = (logits - peak_R1).div_(temperature)
        logprobs_RV.add_(peak_R1 / temperature - masses.log_z_R[:, None])
        return {"logprobs": logprobs_RV.to(torch.float32 if self.bits == 32 else torch.bfloat16)}

    def compact(self, columns: dict[str, Tensor], common: dict[str, Any]) -> "DenseTargets":
        return DenseTargets(logprobs=columns["logprobs"], **common)

    @classmethod
    def parse(cls, text: OptionText) -> "DenseSpec":
        widths = {None: 32, "f32": 32, "bf16": 16}
        if text.first not in widths:
            raise ValueError(f"dense is f32 or bf16, got {text.first!r} in {text.text!r}")
        return cls(bits=widths[text.first], **text.common)

    def __str__(self) -> str:
        dtype = "f32" if self.bits == 32 else "bf16"
        return "dense:" + ",".join([dtype, *self._changed_options()])


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class DenseTargets(Targets):
    """Holds the logprob of every id."""

    kind: ClassVar[str] = "dense"

    logprobs: Tensor
    """(R, V) float32 or bfloat16; -inf where the teacher has a padding row."""

    def __post_init__(self) -> None:
        if self.logprobs.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"logprobs must be float32 or bfloat16, got {self.logprobs.dtype} for dense"
            )
        shape = (*first_dimension(self.logprobs), self.vocab_size)
        expect_tensor("logprobs", self.logprobs, None, shape)
        Targets.__post_init__(self)

    @property
    def num_rows(self) -> int:
        return len(self.logprobs)

    @property
    def device(self) -> torch.device:
        return self.logprobs.device

    def to_dense(self) -> Tensor:
        """Returns (R, V) float32 probabilities."""
        return self.logprobs.float().exp()

    def most_likely(self) -> Tensor:
        return self.logprobs.argmax(1)

    def mode(self) -> tuple[Tensor, Tensor]:
        largest_R, best_R = self.logprobs.float().max(1)
        return best_R, largest_R.exp()

    def _slice(self, start: int, stop: int) -> "DenseTargets":
        return replace(
            self, logprobs=self.logprobs[start:stop], **self._row_tensors(slice(start, stop))
        )

    def _take(self, rows: Tensor) -> "DenseTargets":
        return replace(self, logprobs=self.logprobs[rows], **self._row_tensors(rows))


class DenseCells(FullCells[DenseTargets]):
    """Makes every id a cell, so that the divergence is exact."""

    def within(self, width: int) -> tuple[DenseTargets, Tensor]:
        targets = self.targets
        logprobs = targets.logprobs[:, :width]
        lost_R = targets.logprobs[:, width:].double().exp().sum(1)
        if lost_R.any():
            left_R = logprobs.double().exp().sum(1)
            logprobs = (logprobs - (left_R / (left_R + lost_R)).log()[:, None]).float()
        return replace(targets, vocab_size=width, logprobs=logprobs), lost_R

    def logits(self, rows: slice | Tensor) -> Tensor:
        return self.targets.logprobs[rows]

    def logp(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        return logits.to(dtype)


class Dense(Kind[DenseTargets]):
    """Writes every logprob as it is."""

    number = 1
    spec, targets, cells = DenseSpec, DenseTargets, DenseCells
    id_codings = (NO_IDS,)
    value_bits = (16, 32)
    scope = "dense"

    def _check_counts(self, header: Header) -> None:
        if header.max_entries or header.num_entries:
            raise CodecError("a dense container has zeros where others count entries")

    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        return {"values": bitpack.num_words(header.num_rows * header.vocab_size, header.value_bits)}

    def check_rows(self, targets: DenseTargets, check: RowCheck) -> None:
        mass = targets.logprobs.float().logsumexp(1).exp()
        check.refuse(~torch.isfinite(mass), "its logprobs are not finite numbers")
        # A logprob rounded to bfloat16's 8 bits is off by up to 0.125.
        is_short = targets.logprobs.dtype == torch.bfloat16
        check.refuse_mass(mass, 0.25 if is_short else 1e-3)

    def write(self, targets: DenseTargets, bits: int, id_table: IdTable | None) -> Content:
        values = raw_words(targets.logprobs.reshape(-1))
        return Content([values], value_bits=targets.logprobs.element_size() * 8)

    def read(self, reader: PlaneReader, header: Header, needed: Any) -> DenseTargets:
        num_rows, vocab_size = header.num_rows, header.vocab_size
        values = reader.take_values("values", num_rows * vocab_size, header.value_bits)
        targets = DenseTargets(
            vocab_size=vocab_size,
            temperature=header.temperature,
            logprobs=values.view(num_rows, vocab_size),
            **read_row_fields(reader, num_rows),
        )
        check = RowCheck(0)
        self.check_rows(targets, check)
        check.refuse_row_fields(targets)
        return targets


KIND = Dense()
