"""What to keep of a distribution: `"top_k:64"` in a config file, `TopKSpec(k=64)` in the code.

`parse_targets` is the only parser of these strings; every other place takes a string or a spec.
"""

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar

CODE_BITS = (5, 6, 7, 8, 16)
"""Bits per logprob that `top_k` offers."""
RANGE_BITS = 8
"""Bits of the range of a row's logprobs in `top_k`."""
LEVEL_BITS = 3
"""Bits of a logprob's code that are written in unary."""

MAX_DRAWS = 65_536
"""Draws per row that `sampled` offers at most."""

OPTIONS = "realized=0|1, entropy=0|1, log_z=0|1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """What every kind can carry per row, beside its own content."""

    kind: ClassVar[str]

    realized: bool = True
    """The logprob of the token that really came next."""
    entropy: bool = False
    """The entropy of the teacher's distribution, in nats."""
    log_z: bool = True
    """The logsumexp of the raw logits / temperature."""

    def max_row_nbytes(self, vocab_size: int) -> float:
        """Upper bound of the bytes that one row takes in a container, without its fixed parts."""
        return 2.0 * self.realized + 2.0 * self.entropy + 4.0 * self.log_z

    def _option_names(self) -> list[str]:
        common = {option.name for option in fields(TargetSpec)}
        return [
            f"{option.name}={int(getattr(self, option.name))}"
            for option in fields(self)
            if option.name in common and getattr(self, option.name) != option.default
        ]


@dataclass(frozen=True, slots=True)
class SampledSpec(TargetSpec):
    """Systematic counts of n draws: unbiased for forward KL, and no floats to send.

    `log_z` is off unless asked for: the one loss that takes sampled targets has no use for it.
    Raises ValueError for values out of range.
    """

    kind: ClassVar[str] = "sampled"

    n: int = 64
    """Draws per row, 1 to MAX_DRAWS."""
    log_z: bool = field(default=False, kw_only=True)
    """The logsumexp of the raw logits / temperature."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_DRAWS:
            raise ValueError(f"sampled must have between 1 and {MAX_DRAWS} draws, got {self.n}")

    def max_row_nbytes(self, vocab_size: int) -> float:
        most = min(self.n, vocab_size)
        id_bits = most.bit_length() + most * max(1, (vocab_size - 1).bit_length())
        # Of m counts above 1, each takes at most 2 * log2(n / m) bits on average; m = n / e is worst.
        several = min(vocab_size, self.n / math.e)
        row_bits = id_bits + most + 2 * several * math.log2(self.n / several)
        row_bits = max(row_bits, 8 * most)
        return row_bits / 8 + TargetSpec.max_row_nbytes(self, vocab_size)

    def __str__(self) -> str:
        return "sampled:" + ",".join([str(self.n), *self._option_names()])


@dataclass(frozen=True, slots=True)
class TopKSpec(TargetSpec):
    """The most likely ids with quantised logprobs, and the exact mass of all the others.

    Raises ValueError for values out of range.
    """

    kind: ClassVar[str] = "top_k"

    k: int
    """Entries per row; with `min_p`, at most this many."""
    min_p: float = 0.0
    """0: k entries (fewer only if fewer ids have a probability above 0); else every id with p >= min_p, at least one, at most k."""
    bits: int = 7
    """Bits per logprob: one of CODE_BITS."""

    def __post_init__(self) -> None:
        if not 1 <= self.k < 2**31:
            raise ValueError(f"top_k must be between 1 and 2**31 - 1, got {self.k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if self.bits not in CODE_BITS:
            raise ValueError(
                f"bits must be one of {', '.join(map(str, CODE_BITS))} for top_k, got {self.bits}"
            )

    def max_row_nbytes(self, vocab_size: int) -> float:
        id_bits = max(1, (vocab_size - 1).bit_length())
        code_bits = self.bits - LEVEL_BITS + (1 << LEVEL_BITS) - 1
        row_bits = 2 * self.k.bit_length() + min(self.k, vocab_size) * (id_bits + code_bits)
        return 4.0 + (RANGE_BITS + row_bits) / 8 + TargetSpec.max_row_nbytes(self, vocab_size)

    def __str__(self) -> str:
        head = [f"min_p={self.min_p!r}", f"max_k={self.k}"] if self.min_p else [str(self.k)]
        return "top_k:" + ",".join([*head, f"bits={self.bits}", *self._option_names()])


@dataclass(frozen=True, slots=True)
class DenseSpec(TargetSpec):
    """The logprob of every id. Raises ValueError for values out of range."""

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

    def __str__(self) -> str:
        dtype = "f32" if self.bits == 32 else "bf16"
        return "dense:" + ",".join([dtype, *self._option_names()])


KINDS = (SampledSpec.kind, TopKSpec.kind, DenseSpec.kind)
"""The kinds of target that this version selects, encodes and decodes."""


def parse_targets(spec: str | TargetSpec) -> TargetSpec:
    """The spec that a string such as `"top_k:64"` stands for; a spec is returned as it is.

    `sampled` (64 draws), `sampled:256`, `top_k:64`, `top_k:64,bits=16`,
    `top_k:min_p=1/256,max_k=128,bits=7`, `dense:f32`, `dense:bf16`; each may be followed by
    `realized=0`, `entropy=1`, `log_z=0` (`log_z=1` for sampled).

    Raises ValueError, naming what was got and what is allowed.
    """
    if isinstance(spec, TargetSpec):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"targets must be a string such as 'top_k:64', got {spec!r}")
    kind, _, rest = spec.partition(":")
    kind = kind.strip()
    if kind not in KINDS:
        raise ValueError(
            f"unknown kind of targets {kind!r} in {spec!r}; this version has: {', '.join(KINDS)}"
        )
    words = [word.strip() for word in rest.split(",") if word.strip()]
    positional = [word for word in words if "=" not in word]
    options = {}
    for word in words:
        if "=" in word:
            name, _, value = word.partition("=")
            if name.strip() in options:
                raise ValueError(f"{name.strip()!r} stands twice in {spec!r}")
            options[name.strip()] = value.strip()
    if len(positional) > 1 or (positional and words[0] != positional[0]):
        raise ValueError(f"cannot read {positional[-1]!r} in {spec!r}: options are name=value")
    first = positional[0] if positional else None
    common = {
        name: _flag(name, options.pop(name), spec)
        for name in ("realized", "entropy", "log_z")
        if name in options
    }
    made = {SampledSpec.kind: _sampled, TopKSpec.kind: _top_k, DenseSpec.kind: _dense}
    result = made[kind](first, options, common, spec)
    if options:
        raise ValueError(
            f"unknown option {next(iter(options))!r} in {spec!r}; {kind} takes "
            + ("min_p, max_k, bits, " if kind == TopKSpec.kind else "")
            + OPTIONS
        )
    return result


def _sampled(first: str | None, options: dict[str, str], common: dict, spec: str) -> SampledSpec:
    return SampledSpec(n=_integer("n", first or "64", spec), **common)


def _top_k(first: str | None, options: dict[str, str], common: dict, spec: str) -> TopKSpec:
    bits = _integer("bits", options.pop("bits", "7"), spec)
    if first is not None:
        for name in ("min_p", "max_k"):
            if name in options:
                raise ValueError(
                    f"{name} does not go with a fixed number of entries in {spec!r}; write "
                    "'top_k:min_p=1/256,max_k=128' or 'top_k:64'"
                )
        return TopKSpec(k=_integer("k", first, spec), bits=bits, **common)
    min_p = _fraction("min_p", options.pop("min_p", "1/256"), spec)
    if min_p <= 0.0:
        raise ValueError(f"min_p must be greater than 0, got {min_p} in {spec!r}")
    max_k = _integer("max_k", options.pop("max_k", "128"), spec)
    return TopKSpec(k=max_k, min_p=min_p, bits=bits, **common)


def _dense(first: str | None, options: dict[str, str], common: dict, spec: str) -> DenseSpec:
    widths = {None: 32, "f32": 32, "bf16": 16}
    if first not in widths:
        raise ValueError(f"dense is f32 or bf16, got {first!r} in {spec!r}")
    return DenseSpec(bits=widths[first], **common)


def _integer(name: str, value: str, spec: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {value!r} in {spec!r}") from None


def _fraction(name: str, value: str, spec: str) -> float:
    numerator, _, denominator = value.partition("/")
    try:
        number = float(numerator) / float(denominator or "1")
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{name} must be a number such as 0.004 or 1/256, got {value!r} in {spec!r}"
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r} in {spec!r}")
    return number


def _flag(name: str, value: str, spec: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r} in {spec!r}")
    return value == "1"
