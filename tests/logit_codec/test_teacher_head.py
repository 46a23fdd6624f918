"""The file of a vocabulary head: what comes back, and that damaged ones are refused."""

import math
import struct

import pytest
import torch
import xxhash

from logit_codec import CodecError, TeacherHead
from logit_codec.teacher_head import HeadFile, read_head

VOCAB, SIZE, EFFECTIVE = 7, 4, 5


def make_head(dtype: torch.dtype = torch.float32, **changed) -> TeacherHead:
    generator = torch.Generator().manual_seed(0)
    fields = {
        "weight": torch.randn(VOCAB, SIZE, generator=generator).to(dtype),
        "bias": torch.randn(VOCAB, generator=generator).to(dtype),
        "softcap": 30.0,
        "logit_scale": 0.0625,
        "effective_vocab_size": EFFECTIVE,
        "fingerprint": "",
        **changed,
    }
    return TeacherHead(**fields)


def raw_of(head: TeacherHead) -> bytes:
    file = HeadFile(head)
    return file.read(0, file.nbytes)


def read(data: bytes | bytearray) -> TeacherHead:
    return read_head(torch.frombuffer(bytearray(data), dtype=torch.uint8), "ab" * 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changed", [{}, {"bias": None}, {"softcap": None, "logit_scale": 1.0}])
def test_a_head_comes_back_as_it_was(dtype, changed):
    head = make_head(dtype, **changed)
    again = read(raw_of(head))
    assert again.fingerprint == "ab" * 16
    assert (again.vocab_size, again.hidden_size) == (VOCAB, SIZE)
    assert again.weight.dtype == dtype
    assert torch.equal(again.weight, head.weight)
    assert (again.bias is None) == (head.bias is None)
    if head.bias is not None:
        assert torch.equal(again.bias, head.bias)
    for name in ("softcap", "logit_scale", "effective_vocab_size"):
        assert getattr(again, name) == getattr(head, name)
    states = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(again.logits(states), head.logits(states))


def test_the_bytes_are_those_of_the_page():
    head = make_head(torch.bfloat16)
    header = struct.pack(
        "<4sBBBBIIIIdd24x", b"LSTH", 1, 2, 1, 0, VOCAB, SIZE, EFFECTIVE, 0, 30.0, 0.0625
    )
    values = torch.cat([head.weight.flatten(), head.bias]).view(torch.uint8).numpy().tobytes()
    assert raw_of(head) == header + values
    assert len(header) == 64
    assert HeadFile(head).digest() == xxhash.xxh3_128_digest(header + values)


def test_a_head_is_read_in_pieces_from_anywhere():
    file = HeadFile(make_head())
    whole = file.read(0, file.nbytes)
    assert len(whole) == file.nbytes == 64 + 4 * (VOCAB * SIZE + VOCAB)
    for size in (1, 63, 64, 65, 100):
        pieces = [file.read(at, size) for at in range(0, file.nbytes, size)]
        assert b"".join(pieces) == whole
    assert file.read(file.nbytes, 10) == b""


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, VOCAB)])
def test_logits_are_those_of_the_formula(softcap, bias):
    head = make_head(bias=bias, softcap=softcap)
    values = torch.tensor([[1, -2, 3, 127], [0, 0, 0, 0]], dtype=torch.int8)
    scale = torch.tensor([0.5, 0.0])
    expected = (values.double() * scale[:, None]) @ head.weight.double().T
    expected = 0.0625 * (expected + (0 if bias is None else bias.double()))
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    logits = head.logits(values, scale)
    assert (logits[:, EFFECTIVE:] == -math.inf).all()
    torch.testing.assert_close(logits[:, :EFFECTIVE].double(), expected[:, :EFFECTIVE])


def test_a_head_is_copied_to_a_device_once():
    head = make_head()
    assert head.to("cpu") is head
    assert head.to("meta") is head.to(torch.device("meta"))
    assert head.to("meta").bias.device.type == "meta"
    assert repr(make_head(fingerprint="cd")) == "TeacherHead(7 x 4 torch.float32, cd)"


def test_a_head_of_another_dtype_cannot_be_written():
    with pytest.raises(ValueError, match=r"dtype torch\.float64 cannot be written"):
        HeadFile(make_head(torch.float64))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "why"),
    [
        (0, "B", 0, "not a head"),
        (4, "B", 2, "not a head"),
        (5, "B", 0, "not a head"),
        (5, "B", 4, "not a head"),
        (5, "B", 2, "header implies 134 bytes, got 204"),
        (6, "B", 0, "header implies 176 bytes, got 204"),
        (6, "B", 2, "not a head"),
        (7, "B", 1, "reserved bytes"),
        (8, "I", 0, "0 x 4 cannot have 5"),
        (8, "I", 8, "header implies 224 bytes, got 204"),
        (8, "I", 2**32 - 1, "header implies .* got 204"),
        (12, "I", 0, "7 x 0 cannot have 5"),
        (12, "I", 2**32 - 1, "header implies .* got 204"),
        (16, "I", 0, "7 x 4 cannot have 0"),
        (16, "I", 8, "7 x 4 cannot have 8"),
        (20, "I", 1, "reserved bytes"),
        (24, "d", math.nan, "got nan and 0.0625"),
        (24, "d", math.inf, "got inf and 0.0625"),
        (24, "d", -30.0, "got -30.0 and 0.0625"),
        (32, "d", math.nan, "got 30.0 and nan"),
        (32, "d", -math.inf, "got 30.0 and -inf"),
        (32, "d", 0.0, "got 30.0 and 0.0"),
        (40, "B", 1, "reserved bytes"),
        (63, "B", 1, "reserved bytes"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(offset, layout, value, why):
    data = bytearray(raw_of(make_head()))
    struct.pack_into("<" + layout, data, offset, value)
    with pytest.raises(CodecError, match=why):
        read(data)


def test_truncated_and_longer_heads_are_refused():
    data = raw_of(make_head(torch.bfloat16))
    for length in range(len(data)):
        with pytest.raises(CodecError):
            read(data[:length] or b"\0")
    for more in (b"\0", b"\0\0", data):
        with pytest.raises(CodecError, match="header implies"):
            read(data + more)


def test_a_flipped_bit_of_the_header_is_refused_or_read_as_another_head():
    """Only CodecError; the digest, which the client checks, covers every bit."""
    data = raw_of(make_head())
    for bit in range(8 * 64):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            head = read(changed)
        except CodecError:
            continue
        assert raw_of(head) == changed
