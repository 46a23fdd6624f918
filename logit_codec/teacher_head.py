"""Turns a teacher's hidden states into logits where the teacher itself is not.

Letters: R rows, V vocabulary, D hidden size.
"""

import math
import struct
from dataclasses import dataclass, field, replace

import torch
import xxhash
from torch import Tensor

from logit_codec.errors import CodecError


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class TeacherHead:
    """Holds a teacher's vocabulary head, and what the model does to its product.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap); without softcap,
    they are logit_scale * (hidden @ weight.T + bias). Gemma 2 has a softcap, Cohere and Granite a
    scale.
    """

    weight: Tensor
    """(V, D), in the teacher's dtype."""
    bias: Tensor | None = None
    """(V,)."""
    softcap: float | None = None
    logit_scale: float = 1.0
    effective_vocab_size: int
    """Ids from here to V are padding: their probability is 0."""
    fingerprint: str
    """Hexadecimal; targets of kind `hidden` name the head that they are for."""
    _elsewhere: dict[torch.device, "TeacherHead"] = field(default_factory=dict)
    """Copies on other devices, so that each is made once."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.weight)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.weight.shape[1]

    def __repr__(self) -> str:
        return (
            f"TeacherHead({self.vocab_size} x {self.hidden_size} {self.weight.dtype}, "
            f"{self.fingerprint})"
        )

    def to(self, device: torch.device | str) -> "TeacherHead":
        """Returns the same head on `device`; it is copied there once."""
        device = torch.device(device)
        if device == self.weight.device:
            return self
        if device not in self._elsewhere:
            bias = None if self.bias is None else self.bias.to(device)
            self._elsewhere[device] = replace(self, weight=self.weight.to(device), bias=bias)
        return self._elsewhere[device]

    def logits(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """Projects (R, D) hidden states -> (R, V) float32 logits, -inf for padding.

        scale: (R,), what integer values are to be multiplied with; they are exact in any dtype.
        """
        weight = self.weight
        logits_RV = (values.to(weight.dtype) @ weight.T).float()
        if scale is not None:
            logits_RV.mul_(scale[:, None])
        if self.bias is not None:
            logits_RV.add_(self.bias)
        if self.logit_scale != 1.0:
            logits_RV.mul_(self.logit_scale)
        if self.softcap is not None:
            logits_RV.div_(self.softcap).tanh_().mul_(self.softcap)
        logits_RV[:, self.effective_vocab_size :] = -torch.inf
        return logits_RV


HEAD_MAGIC = b"LSTH"
HEAD_VERSION = 1
HEAD_HEADER = struct.Struct("<4sBBBxIII4xdd24x")
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
PIECE_NBYTES = 16 << 20


class HeadFile:
    """Lays a head out as bytes, which are read in pieces and never made as a whole.

    FORMAT.md has the layout. The fingerprint of a head is the XXH3-128 of these bytes.
    """

    def __init__(self, head: TeacherHead) -> None:
        """Raises ValueError for a dtype that has no number."""
        numbers = {dtype: number for number, dtype in DTYPES.items()}
        if head.weight.dtype not in numbers:
            raise ValueError(f"a head of dtype {head.weight.dtype} cannot be written")
        parts = [head.weight.detach().contiguous().flatten()]
        if head.bias is not None:
            parts.append(head.bias.detach().to(head.weight.dtype).contiguous())
        header = HEAD_HEADER.pack(
            HEAD_MAGIC,
            HEAD_VERSION,
            numbers[head.weight.dtype],
            head.bias is not None,
            head.vocab_size,
            head.hidden_size,
            head.effective_vocab_size,
            abs(head.softcap or 0.0),  # softcap * tanh(x / softcap) has no sign
            head.logit_scale,
        )
        self._parts = [torch.frombuffer(bytearray(header), dtype=torch.uint8)]
        self._parts += [part.view(torch.uint8) for part in parts]

    @property
    def nbytes(self) -> int:
        """The length of the file."""
        return sum(len(part) for part in self._parts)

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` on, fewer at the end."""
        found = []
        for part in self._parts:
            if offset < len(part) and size > 0:
                piece = part[offset : offset + size].cpu().numpy().tobytes()
                found.append(piece)
                size -= len(piece)
            offset = max(0, offset - len(part))
        return b"".join(found)

    def digest(self) -> bytes:
        """Returns the XXH3-128 (canonical) of all bytes."""
        state = xxhash.xxh3_128()
        for part in self._parts:
            for piece in part.split(PIECE_NBYTES):
                state.update(piece.cpu().numpy().data)
        return state.digest()


def read_head(raw: Tensor, fingerprint: str) -> TeacherHead:
    """Reads the bytes of a head, (n,) uint8, without copying them; whose fingerprint was checked.

    Raises CodecError for what is no such file.
    """
    if len(raw) < HEAD_HEADER.size:
        raise CodecError(f"a head has at least {HEAD_HEADER.size} bytes, got {len(raw)}")
    header = raw[: HEAD_HEADER.size].numpy().tobytes()
    fields = HEAD_HEADER.unpack(header)
    magic, version, number, has_bias, vocab_size, hidden_size, effective, softcap, scale = fields
    if magic != HEAD_MAGIC or version != HEAD_VERSION or number not in DTYPES or has_bias > 1:
        raise CodecError(f"not a head that this version reads: it begins with {fields[:4]}")
    if not 1 <= effective <= vocab_size or not hidden_size:
        raise CodecError(
            f"a head of {vocab_size} x {hidden_size} cannot have {effective} ids with a probability"
        )
    if not (0 <= softcap < math.inf and math.isfinite(scale) and scale):
        raise CodecError(
            "a head's softcap must be finite and not negative and its scale finite and not 0, got "
            f"{softcap} and {scale}"
        )
    if HEAD_HEADER.pack(*fields) != header:
        raise CodecError("the reserved bytes of a head's header are not zero")
    dtype = DTYPES[number]
    count = vocab_size * hidden_size
    expected = HEAD_HEADER.size + (count + vocab_size * has_bias) * dtype.itemsize
    if len(raw) != expected:
        raise CodecError(f"the head's header implies {expected} bytes, got {len(raw)}")
    values = raw[HEAD_HEADER.size :].view(dtype)
    return TeacherHead(
        weight=values[:count].view(vocab_size, hidden_size),
        bias=values[count:] if has_bias else None,
        softcap=softcap or None,
        logit_scale=scale,
        effective_vocab_size=effective,
        fingerprint=fingerprint,
    )
