"""Defines the kind `realized`: the logprob of the token that really came next, and nothing else.

Letters: R rows.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from logit_codec.blocks import BLOCK, RowMasses
from logit_codec.errors import CodecError
from logit_codec.header import NO_IDS, Header
from logit_codec.id_table import IdTable
from logit_codec.inputs import RowInputs
from logit_codec.kinds.base import Content, Kind
from logit_codec.planes import PlaneReader, RowCheck, raw_words
from logit_codec.spec import OptionText, TargetSpec
from logit_codec.targets import UNKNOWN, Targets

ABOVE_0 = 1e-3
"""By how much rounding may bring a logprob above 0."""


@dataclass(frozen=True, slots=True)
class RealizedSpec(TargetSpec):
    """Asks for one float32 per row. Raises ValueError for any other field."""

    kind: ClassVar[str] = "realized"

    log_z: bool = field(default=False, kw_only=True)
    """Must be left off."""

    def __post_init__(self) -> None:
        if not self.realized or self.entropy or self.log_z:
            raise ValueError(
                "realized targets are the logprob of the token that came next and nothing else: "
                "realized=0, entropy=1 and log_z=1 do not go with them. Other kinds have all three"
            )

    def max_row_nbytes(self, vocab_size: int) -> float:
        return 4.0

    def scratch_row_nbytes(self, vocab_size: int) -> int:
        return BLOCK

    def select(self, masses: RowMasses | None, inputs: RowInputs) -> dict[str, Tensor]:
        return {}

    def compact(self, columns: dict[str, Tensor], common: dict[str, Any]) -> "RealizedTargets":
        return RealizedTargets(**common)

    @classmethod
    def parse(cls, text: OptionText) -> "RealizedSpec":
        if text.first is not None:
            raise ValueError(f"realized takes no options, got {text.first!r} in {text.text!r}")
        return cls(**text.common)

    def __str__(self) -> str:
        return "realized"


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class RealizedTargets(Targets):
    """Holds `realized_logprob` only, -inf for a token of probability 0.

    No loss of distributions can be computed from it.
    """

    kind: ClassVar[str] = "realized"

    def __post_init__(self) -> None:
        if self.realized_logprob is None or self.realized_logprob.dim() != 1:
            raise ValueError("realized targets need realized_logprob, (R,) float32")
        if self.entropy is not None or self.log_z is not None:
            raise ValueError("realized targets hold realized_logprob and nothing else")
        Targets.__post_init__(self)

    @property
    def _logprobs(self) -> Tensor:
        assert self.realized_logprob is not None
        return self.realized_logprob

    @property
    def num_rows(self) -> int:
        return len(self._logprobs)

    @property
    def device(self) -> torch.device:
        return self._logprobs.device

    def to_dense(self) -> Tensor:
        """Raises ValueError: one logprob is no distribution."""
        raise ValueError("realized targets hold one logprob per row, which is no distribution")

    def most_likely(self) -> Tensor:
        """Returns (R,) int64 UNKNOWN: these targets do not tell."""
        return torch.full_like(self._logprobs, UNKNOWN, dtype=torch.int64)

    def _slice(self, start: int, stop: int) -> "RealizedTargets":
        return replace(self, **self._row_tensors(slice(start, stop)))

    def _take(self, rows: Tensor) -> "RealizedTargets":
        return replace(self, **self._row_tensors(rows))


class Realized(Kind[RealizedTargets]):
    """Writes one plane of float32."""

    number = 5
    spec, targets = RealizedSpec, RealizedTargets
    id_codings = (NO_IDS,)
    value_bits = (32,)
    flags = 0

    def _check_counts(self, header: Header) -> None:
        if header.max_entries or header.num_entries:
            raise CodecError("a realized container has zeros where others count entries")

    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        return {"logprobs": header.num_rows}

    def check_rows(self, targets: RealizedTargets, check: RowCheck) -> None:
        is_bad = ~(targets._logprobs <= ABOVE_0)
        check.refuse(is_bad, "its logprob is not a number of at most 0")

    def write(self, targets: RealizedTargets, bits: int, id_table: IdTable | None) -> Content:
        return Content([raw_words(targets._logprobs)], value_bits=32)

    def read(self, reader: PlaneReader, header: Header, needed: Any) -> RealizedTargets:
        targets = RealizedTargets(
            vocab_size=header.vocab_size,
            temperature=header.temperature,
            realized_logprob=torch.from_numpy(reader.take_floats("logprobs")),
        )
        self.check_rows(targets, RowCheck(0))
        return targets


KIND = Realized()
