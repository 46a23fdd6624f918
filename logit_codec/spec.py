"""Defines what every kind of target can be asked for: the base of all specs, and its option text.

A spec says what to keep of a distribution: `"top_k:64"` in a config file, `TopKSpec(k=64)` in the
code. The spec of each kind is in its own file in `logit_codec/kinds/`.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from torch import Tensor

from logit_codec.blocks import RowMasses
from logit_codec.inputs import RowInputs
from logit_codec.targets import Targets

COMMON_OPTIONS = ("realized", "entropy", "log_z")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """Says what every kind can carry per row, in addition to its own content."""

    kind: ClassVar[str]
    set_by_server: ClassVar[tuple[str, ...]] = ()
    """Fields that no text and no message sets; they follow from the request and the teacher."""
    option_names: ClassVar[tuple[str, ...]] = ()
    """The options of its text that other kinds do not have."""
    needs_uniforms: ClassVar[bool] = False
    """Whether a selection draws at random, from one uniform number per row."""
    needs_maxima: ClassVar[bool] = False
    """Whether a selection reads the maxima of blocks."""
    needs_masses: ClassVar[bool] = True
    """Whether a selection reads the logits."""
    needs_given_ids: ClassVar[bool] = False
    """Whether a client names ids for each row."""
    needs_hidden: ClassVar[bool] = False
    """Whether a selection reads the states that the vocabulary head reads."""

    realized: bool = True
    """The logprob of the token that really came next."""
    entropy: bool = False
    """The entropy of the teacher's distribution, in nats."""
    log_z: bool = True
    """The logsumexp of the raw logits / temperature."""

    @property
    def code_bits(self) -> int:
        """Bits per logprob for `encode`; only top_k and given_ids use them."""
        return 7

    @property
    def reads_logits(self) -> bool:
        """Whether rows go through the vocabulary head; all others cost the base model alone."""
        return self.needs_masses or self.realized or self.entropy or self.log_z

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The layers after which a selection reads the states."""
        return ()

    def for_rows(self, most_given: int) -> Self:
        """Returns the spec for rows with at most so many given ids each."""
        return self

    def for_head(self, head_fingerprint: str, hidden_size: int) -> Self:
        """Returns the spec for the teacher whose vocabulary head reads states of this size."""
        return self

    def max_row_nbytes(self, vocab_size: int) -> float:
        """Returns an upper bound of the bytes of a row in a container, without its fixed parts."""
        return 2.0 * self.realized + 2.0 * self.entropy + 4.0 * self.log_z

    def max_decoded_row_nbytes(self, vocab_size: int) -> float:
        """Returns an upper bound of the memory of one decoded row, in bytes."""
        return 4 * (self.realized + self.entropy + self.log_z)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if nothing can be selected from so many ids."""
        return

    def scratch_row_nbytes(self, vocab_size: int) -> int:
        """Returns about how much memory `select` needs per row, beside its result and the masses."""
        raise ValueError(f"no selection for {type(self).__name__}")

    def select(self, masses: RowMasses | None, inputs: RowInputs) -> dict[str, Tensor]:
        """Selects the kind's own columns from R > 0 rows; `select_rows` adds the common ones.

        masses: None unless `reads_logits`.

        Shapes must follow from shapes, and nothing may wait for the device.
        """
        raise ValueError(f"no selection for {type(self).__name__}")

    def compact(self, columns: dict[str, Tensor], common: dict[str, Any]) -> Targets:
        """Makes targets of what `select` returned, on the CPU; common: fields of every kind."""
        raise NotImplementedError

    @classmethod
    def parse(cls, text: "OptionText") -> Self:
        """Reads the kind's own options. Raises ValueError for values that are not allowed."""
        raise NotImplementedError

    def fill(self, message: Any) -> None:
        """Sets the fields of the kind's protobuf message, named like its own options."""
        for name in self._own_fields():
            setattr(message, name, getattr(self, name))

    @classmethod
    def read(cls, message: Any, **common: bool) -> Self:
        """Makes a spec from the kind's protobuf message. Raises ValueError for bad values."""
        return cls(**{name: getattr(message, name) for name in cls._own_fields()}, **common)

    @classmethod
    def _own_fields(cls) -> list[str]:
        own = [option.name for option in fields(cls) if option.name not in COMMON_OPTIONS]
        return [name for name in own if name not in cls.set_by_server]

    def _changed_options(self) -> list[str]:
        """Lists the common options that differ from their default, as text."""
        return [
            f"{option.name}={int(getattr(self, option.name))}"
            for option in fields(self)
            if option.name in COMMON_OPTIONS and getattr(self, option.name) != option.default
        ]


@dataclass(slots=True)
class OptionText:
    """Holds the text after the name of a kind, cut into options; a kind takes its own ones."""

    text: str
    """The whole text, for error messages."""
    first: str | None
    """The one option without a name, such as the 64 of `top_k:64`."""
    named: dict[str, str]
    """Options that nothing has taken yet."""
    common: dict[str, Any] = field(default_factory=dict)
    """The options that every kind has, where they are given."""

    def take(self, name: str, default: str) -> str:
        """Returns and removes a named option."""
        return self.named.pop(name, default)

    def take_integer(self, name: str, default: str) -> int:
        """Returns and removes a named option that is a whole number. Raises ValueError."""
        return self.integer(name, self.take(name, default))

    def integer(self, name: str, value: str) -> int:
        """Reads a whole number. Raises ValueError, which names the option."""
        try:
            return int(value)
        except ValueError:
            raise ValueError(
                f"{name} must be a whole number, got {value!r} in {self.text!r}"
            ) from None

    def take_common(self) -> None:
        """Moves the options that every kind has to `common`. Raises ValueError unless 0 or 1."""
        for name in COMMON_OPTIONS:
            if name in self.named:
                value = self.named.pop(name)
                if value not in ("0", "1"):
                    raise ValueError(f"{name} must be 0 or 1, got {value!r} in {self.text!r}")
                self.common[name] = value == "1"
