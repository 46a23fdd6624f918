"""Defines the kind `hidden`: the states that the vocabulary head reads.

With the head itself they are the whole distribution, at D numbers a row instead of V.

Letters: R rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.blocks import BLOCK, RowMasses
from logit_codec.errors import CodecError
from logit_codec.given_ids import GivenIds
from logit_codec.header import DIGEST_NBYTES, NO_IDS, Header
from logit_codec.id_table import IdTable
from logit_codec.inputs import RowInputs
from logit_codec.kinds.base import Content, FullCells, Kind
from logit_codec.planes import PlaneReader, RowCheck, raw_words, read_row_fields
from logit_codec.spec import OptionText, TargetSpec
from logit_codec.targets import Targets, expect_tensor, first_dimension
from logit_codec.teacher_head import TeacherHead

LARGEST = 127
USUAL_SIZE = 4096
"""Numbers of a state that bounds assume where the teacher is not known yet."""
CHUNK_ROWS = 64
"""Rows that are projected at a time where something is added up over the vocabulary."""


@dataclass(frozen=True, slots=True)
class HiddenSpec(TargetSpec):
    """Asks for the states that the vocabulary head reads. Raises ValueError for bad values."""

    kind: ClassVar[str] = "hidden"
    set_by_server: ClassVar[tuple[str, ...]] = ("head_fingerprint", "hidden_size")
    needs_masses: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = True

    bits: int = 8
    """8: integers with one scale per row; 16: bfloat16."""
    head_fingerprint: str = ""
    hidden_size: int = 0
    log_z: bool = field(default=False, kw_only=True)
    """The logsumexp of the raw logits / temperature; it follows from the states and the head."""

    def __post_init__(self) -> None:
        if self.bits not in (8, 16):
            raise ValueError(f"bits must be 8 (int8) or 16 (bfloat16) for hidden, got {self.bits}")

    def for_head(self, head_fingerprint: str, hidden_size: int) -> Self:
        return replace(self, head_fingerprint=head_fingerprint, hidden_size=hidden_size)

    def max_row_nbytes(self, vocab_size: int) -> float:
        size = self.hidden_size or USUAL_SIZE
        common = TargetSpec.max_row_nbytes(self, vocab_size)
        return size * self.bits / 8 + (2 if self.bits == 8 else 0) + common

    def max_decoded_row_nbytes(self, vocab_size: int) -> float:
        common = TargetSpec.max_decoded_row_nbytes(self, vocab_size)
        return common + (self.hidden_size or USUAL_SIZE) * self.bits / 8 + 4

    def scratch_row_nbytes(self, vocab_size: int) -> int:
        return BLOCK

    def select(self, masses: RowMasses | None, inputs: RowInputs) -> dict[str, Tensor]:
        hidden_RD = inputs.hidden
        assert hidden_RD is not None
        if self.bits == 16:
            return {"values": hidden_RD.to(torch.bfloat16)}
        hidden_RD = hidden_RD.float()
        # A scale that is rounded to 8 bits costs nothing: no code grows by half a step.
        scale_R = (hidden_RD.abs().amax(1) / LARGEST).to(torch.bfloat16).float()
        codes_RD = hidden_RD / scale_R.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return {"values": codes_RD.round_().to(torch.int8), "scale": scale_R}

    def compact(self, columns: dict[str, Tensor], common: dict[str, Any]) -> "HiddenTargets":
        return HiddenTargets(
            values=columns["values"],
            scale=columns.get("scale"),
            head_fingerprint=self.head_fingerprint,
            **common,
        )

    @classmethod
    def parse(cls, text: OptionText) -> "HiddenSpec":
        widths = {None: 8, "int8": 8, "bf16": 16}
        if text.first not in widths:
            raise ValueError(f"hidden is int8 or bf16, got {text.first!r} in {text.text!r}")
        return cls(bits=widths[text.first], **text.common)

    def __str__(self) -> str:
        name = "int8" if self.bits == 8 else "bf16"
        return "hidden:" + ",".join([name, *self._changed_options()])


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class HeadTargets(Targets):
    """Holds what logits are computed from when they are needed, a chunk of rows at a time."""

    kind: ClassVar[str] = "hidden"

    @property
    def effective_vocab_size(self) -> int:
        """Ids from here on are padding: their probability is 0."""
        raise NotImplementedError

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Computes (C, V) float32 logits of some rows. Raises ValueError without the head."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """Returns (R, V) float32 probabilities. Raises ValueError without the head."""
        return (self.logits(slice(None)) / self.temperature).softmax(1)

    def most_likely(self) -> Tensor:
        return self.mode()[0]

    def mode(self) -> tuple[Tensor, Tensor]:
        best = [self._mode_of(slice(at, at + CHUNK_ROWS)) for at in range(0, len(self), CHUNK_ROWS)]
        if not best:
            nothing = torch.zeros(0, device=self.device)
            return nothing.long(), nothing
        ids, logprobs = zip(*best, strict=True)
        return torch.cat(ids), torch.cat(logprobs)

    def _mode_of(self, rows: slice) -> tuple[Tensor, Tensor]:
        largest_C, best_C = (self.logits(rows) / self.temperature).softmax(1).max(1)
        return best_C, largest_C


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class HiddenTargets(HeadTargets):
    """Holds the states that the vocabulary head reads, and the head, once it is known."""

    values: Tensor
    """(R, D) int8 or bfloat16."""
    scale: Tensor | None = None
    """(R,) float32: what int8 values are multiplied with. A container has it as bfloat16, and so does
    what `select` makes."""
    head_fingerprint: str
    """Names the head that the states are for."""
    head: TeacherHead | None = None
    """Turns the states into logits; a connected teacher sets it (`teacher.head()`)."""

    def __post_init__(self) -> None:
        is_good = self.values.dtype in (torch.int8, torch.bfloat16) and self.values.dim() == 2
        if not is_good or self.values.shape[1] == 0:
            raise ValueError(
                f"values must be (R, D) int8 or bfloat16, got {self.values.dtype} of shape "
                f"{tuple(self.values.shape)}"
            )
        if (self.scale is not None) != (self.values.dtype == torch.int8):
            raise ValueError("int8 values need a scale, and bfloat16 values have none")
        if self.scale is not None:
            expect_tensor("scale", self.scale, torch.float32, first_dimension(self.values))
        if self.head is not None and not isinstance(self.head, TeacherHead):
            raise ValueError(
                f"the head must be a TeacherHead, as teacher.head() returns, got "
                f"{type(self.head).__name__}"
            )
        if self.head is not None and self.head.fingerprint != self.head_fingerprint:
            raise ValueError(
                f"these hidden states are for the head {self.head_fingerprint}, got "
                f"{self.head.fingerprint}: use teacher.head() of the teacher that they came from"
            )
        Targets.__post_init__(self)

    @property
    def num_rows(self) -> int:
        return len(self.values)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def hidden(self) -> Tensor:
        """(R, D) float32: the states."""
        if self.scale is None:
            return self.values.float()
        return self.values * self.scale[:, None]

    def with_head(self, head: TeacherHead) -> "HiddenTargets":
        """Returns the same targets with the head. Raises ValueError for the head of another teacher."""
        return replace(self, head=head)

    @property
    def effective_vocab_size(self) -> int:
        return self.known_head().effective_vocab_size

    def logits(self, rows: slice | Tensor) -> Tensor:
        scale = None if self.scale is None else self.scale[rows]
        head = self.known_head().to(self.device)
        return head.logits(self.values[rows], scale)[:, : self.vocab_size]

    def known_head(self) -> TeacherHead:
        """Returns the head. Raises ValueError if these targets came without it."""
        if self.head is None:
            raise ValueError(
                "hidden targets need the teacher's vocabulary head: pass "
                "teacher_head=teacher.head(), or targets.with_head(teacher.head())"
            )
        return self.head

    def _slice(self, start: int, stop: int) -> "HiddenTargets":
        return self._rows(slice(start, stop))

    def _take(self, rows: Tensor) -> "HiddenTargets":
        return self._rows(rows)

    def _rows(self, rows: slice | Tensor) -> "HiddenTargets":
        scale = None if self.scale is None else self.scale[rows]
        return replace(self, values=self.values[rows], scale=scale, **self._row_tensors(rows))


class HiddenCells(FullCells[HeadTargets]):
    """Makes every id a cell, whose p follows from the head: the divergence is exact."""

    def within(self, width: int) -> tuple[HeadTargets, Tensor]:
        targets = self.targets
        lost_R = torch.zeros(targets.num_rows, dtype=torch.float64, device=targets.device)
        if width < targets.effective_vocab_size:
            for at in range(0, targets.num_rows, CHUNK_ROWS):
                rows = slice(at, at + CHUNK_ROWS)
                p_CV = (self.logits(rows) / targets.temperature).softmax(1)
                lost_R[rows] = p_CV[:, width:].double().sum(1)
        return replace(targets, vocab_size=width), lost_R

    @torch.no_grad()
    def logits(self, rows: slice | Tensor) -> Tensor:
        # The product has the teacher's own dtype, whatever the student's are cast to.
        with torch.autocast(self.targets.device.type, enabled=False):
            return self.targets.logits(rows)

    def logp(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        # `logits` leaves out what is not shared, so that the rest sums to 1.
        return (logits.to(dtype) / self.targets.temperature).log_softmax(1)


class Hidden(Kind[HiddenTargets]):
    """Writes the states as they are."""

    number = 6
    spec, targets, cells = HiddenSpec, HiddenTargets, HiddenCells
    id_codings = (NO_IDS,)
    value_bits = (8, 16)
    scope = "hidden"

    def _check_counts(self, header: Header) -> None:
        if header.num_entries or not 1 <= header.max_entries < 2**31:
            raise CodecError(
                "a hidden container has 0 entries and states of 1 to 2**31-1 numbers, got "
                f"{header.num_entries} and {header.max_entries}"
            )

    def find_needed(self, header: Header, id_tables: Any, given_ids: GivenIds | None) -> None:
        return None  # the targets name the head; it is needed when they are used

    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        count = header.num_rows * header.max_entries
        sizes: dict[str, int | None] = {"values": bitpack.num_words(count, header.value_bits)}
        if header.value_bits == 8:
            sizes["scale"] = bitpack.num_words(header.num_rows, 16)
        return sizes

    def check_rows(self, targets: HiddenTargets, check: RowCheck) -> None:
        values = targets.values if targets.scale is None else targets.scale.to(torch.bfloat16)
        bad = ~torch.isfinite(values)
        check.refuse(bad if bad.dim() == 1 else bad.any(1), "its states are not finite numbers")
        if targets.scale is not None:
            check.refuse(targets.scale < 0, "its scale is below 0")

    def write(self, targets: HiddenTargets, bits: int, id_table: IdTable | None) -> Content:
        planes = [raw_words(targets.values.reshape(-1))]
        if targets.scale is not None:
            planes.append(raw_words(targets.scale.to(torch.bfloat16)))
        return Content(
            planes,
            value_bits=8 * targets.values.element_size(),
            max_entries=targets.values.shape[1],
            needed=read_fingerprint(targets.head_fingerprint),
        )

    def read(self, reader: PlaneReader, header: Header, needed: Any) -> HiddenTargets:
        num_rows, size = header.num_rows, header.max_entries
        values = reader.take_values("values", num_rows * size, header.value_bits)
        scale = None
        if header.value_bits == 8:
            scale = reader.take_values("scale", num_rows, 16).float()
        targets = HiddenTargets(
            vocab_size=header.vocab_size,
            temperature=header.temperature,
            values=values.view(num_rows, size),
            scale=scale,
            head_fingerprint=header.needed.hex(),
            **read_row_fields(reader, num_rows),
        )
        check = RowCheck(0)
        self.check_rows(targets, check)
        check.refuse_row_fields(targets)
        return targets


def read_fingerprint(text: str) -> bytes:
    """Turns a head's fingerprint into bytes. Raises ValueError for one that is none."""
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_NBYTES:
        raise ValueError(f"a head's fingerprint is {2 * DIGEST_NBYTES} hex digits, got {text!r}")
    return digest


KIND = Hidden()
