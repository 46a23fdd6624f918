"""Defines the kind `features`: the states after chosen layers.

They are for losses on features and for draft models, which read several layers of their target.

Letters: R rows, L layers, D hidden size.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.blocks import BLOCK, RowMasses
from logit_codec.errors import CodecError
from logit_codec.header import NO_IDS, Header
from logit_codec.id_table import IdTable
from logit_codec.inputs import RowInputs
from logit_codec.kinds.base import Content, Kind
from logit_codec.kinds.hidden import USUAL_SIZE
from logit_codec.planes import PlaneReader, RowCheck, raw_words, read_row_fields
from logit_codec.spec import OptionText, TargetSpec
from logit_codec.targets import UNKNOWN, Targets

MAX_LAYERS = 64
MAX_LAYER = 1_000_000


@dataclass(frozen=True, slots=True)
class FeaturesSpec(TargetSpec):
    """Asks for the states after some layers, as bfloat16. Raises ValueError for bad values.

    Layers are counted as in transformers' `output_hidden_states`: 0 is the embeddings, n the
    output of the n-th layer; the last one has gone through the model's final norm.
    """

    kind: ClassVar[str] = "features"
    option_names: ClassVar[tuple[str, ...]] = ("layers",)
    set_by_server: ClassVar[tuple[str, ...]] = ("hidden_size",)
    needs_masses: ClassVar[bool] = False

    layers: tuple[int, ...]
    """Ascending, none twice."""
    hidden_size: int = 0
    log_z: bool = field(default=False, kw_only=True)
    """The logsumexp of the raw logits / temperature."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        _check_layers(self.layers)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.layers

    def for_head(self, head_fingerprint: str, hidden_size: int) -> Self:
        return replace(self, hidden_size=hidden_size)

    def _state_nbytes(self) -> int:
        return 2 * len(self.layers) * (self.hidden_size or USUAL_SIZE)

    def max_row_nbytes(self, vocab_size: int) -> float:
        # The numbers of the layers come once per container: it may have a single row.
        numbers_nbytes = 4 * len(self.layers)
        return self._state_nbytes() + numbers_nbytes + TargetSpec.max_row_nbytes(self, vocab_size)

    def max_decoded_row_nbytes(self, vocab_size: int) -> float:
        return self._state_nbytes() + TargetSpec.max_decoded_row_nbytes(self, vocab_size)

    def scratch_row_nbytes(self, vocab_size: int) -> int:
        return BLOCK

    def select(self, masses: RowMasses | None, inputs: RowInputs) -> dict[str, Tensor]:
        assert inputs.features is not None
        return {"hidden": inputs.features.to(torch.bfloat16)}

    def compact(self, columns: dict[str, Tensor], common: dict[str, Any]) -> "FeaturesTargets":
        return FeaturesTargets(hidden=columns["hidden"], layers=self.layers, **common)

    def fill(self, message: Any) -> None:
        message.layers.extend(self.layers)

    @classmethod
    def parse(cls, text: OptionText) -> "FeaturesSpec":
        if text.first not in (None, "bf16") or "layers" not in text.named:
            raise ValueError(
                f"features need their layers, such as 'features:layers=8+16'; got {text.text!r}"
            )
        numbers = text.take("layers", "").split("+")
        layers = tuple(text.integer("layers", number) for number in numbers)
        return cls(layers=layers, **text.common)

    def __str__(self) -> str:
        layers = "+".join(map(str, self.layers))
        return "features:" + ",".join([f"layers={layers}", *self._changed_options()])


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class FeaturesTargets(Targets):
    """Holds the states after some layers."""

    kind: ClassVar[str] = "features"

    hidden: Tensor
    """(R, L, D) bfloat16."""
    layers: tuple[int, ...]
    """L numbers, ascending; `FeaturesSpec` says how they are counted."""

    def __post_init__(self) -> None:
        _check_layers(self.layers)
        is_good = self.hidden.dtype == torch.bfloat16 and self.hidden.dim() == 3
        if not is_good or self.hidden.shape[2] == 0:
            raise ValueError(
                f"hidden must be (R, L, D) bfloat16, got {self.hidden.dtype} of shape "
                f"{tuple(self.hidden.shape)}"
            )
        if len(self.layers) != self.hidden.shape[1]:
            raise ValueError(
                f"there are {len(self.layers)} layers, and states of {self.hidden.shape[1]}"
            )
        Targets.__post_init__(self)

    @property
    def num_rows(self) -> int:
        return len(self.hidden)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def to_dense(self) -> Tensor:
        """Raises ValueError: these states are no distribution."""
        raise ValueError("features hold states of layers, which are no distribution")

    def most_likely(self) -> Tensor:
        """Returns (R,) int64 UNKNOWN: these targets do not tell."""
        return torch.full((self.num_rows,), UNKNOWN, device=self.device)

    def _slice(self, start: int, stop: int) -> "FeaturesTargets":
        rows = slice(start, stop)
        return replace(self, hidden=self.hidden[rows], **self._row_tensors(rows))

    def _take(self, rows: Tensor) -> "FeaturesTargets":
        return replace(self, hidden=self.hidden[rows], **self._row_tensors(rows))


class Features(Kind[FeaturesTargets]):
    """Writes the numbers of the layers, and then the states."""

    number = 7
    spec, targets = FeaturesSpec, FeaturesTargets
    id_codings = (NO_IDS,)
    value_bits = (16,)
    scope = "hidden"

    def _check_counts(self, header: Header) -> None:
        if not (1 <= header.num_entries <= MAX_LAYERS and 1 <= header.max_entries < 2**31):
            raise CodecError(
                f"a features container has 1 to {MAX_LAYERS} layers and states of 1 to 2**31-1 "
                f"numbers, got {header.num_entries} and {header.max_entries}"
            )

    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        count = header.num_rows * header.num_entries * header.max_entries
        return {"layers": header.num_entries, "values": bitpack.num_words(count, 16)}

    def check_rows(self, targets: FeaturesTargets, check: RowCheck) -> None:
        is_bad = ~torch.isfinite(targets.hidden).flatten(1).all(1)
        check.refuse(is_bad, "its states are not finite numbers")

    def write(self, targets: FeaturesTargets, bits: int, id_table: IdTable | None) -> Content:
        layers = torch.tensor(targets.layers, dtype=torch.int32, device=targets.device)
        return Content(
            [layers, raw_words(targets.hidden.reshape(-1))],
            value_bits=16,
            max_entries=targets.hidden.shape[2],
            num_entries=len(targets.layers),
        )

    def read(self, reader: PlaneReader, header: Header, needed: Any) -> FeaturesTargets:
        num_layers, size = header.num_entries, header.max_entries
        layers = tuple(reader.take_numbers("layers", num_layers, 32).tolist())
        try:
            _check_layers(layers)
        except ValueError as error:
            raise CodecError(str(error)) from None
        values = reader.take_values("values", header.num_rows * num_layers * size, 16)
        targets = FeaturesTargets(
            vocab_size=header.vocab_size,
            temperature=header.temperature,
            hidden=values.view(header.num_rows, num_layers, size),
            layers=layers,
            **read_row_fields(reader, header.num_rows),
        )
        check = RowCheck(0)
        self.check_rows(targets, check)
        check.refuse_row_fields(targets)
        return targets


def _check_layers(layers: tuple[int, ...]) -> None:
    is_good = 1 <= len(layers) <= MAX_LAYERS and list(layers) == sorted(set(layers))
    if not is_good or not 0 <= layers[0] <= layers[-1] <= MAX_LAYER:
        raise ValueError(
            f"layers must be 1 to {MAX_LAYERS} ascending numbers from 0 to {MAX_LAYER}, got "
            f"{list(layers)}"
        )


KIND = Features()
