"""A second reader of the container, written from FORMAT.md alone: struct and loops, no torch.

It shares no code with logit_codec, so a test that compares the two also tests the page.
"""

import math
import struct
from dataclasses import dataclass, field
from itertools import pairwise

import xxhash


class Refused(Exception):
    """The page says that a reader refuses these bytes."""


@dataclass
class Plain:
    """One container as Python numbers."""

    kind: str
    vocab_size: int
    temperature: float
    value_bits: int
    ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    ranges: list[int] = field(default_factory=list)
    codes: list[list[int]] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    realized: list[float] | None = None
    entropy: list[float] | None = None
    log_z: list[float] | None = None


def read(data: bytes) -> Plain:
    """The content of one container; raises Refused for what the page says is malformed."""
    need(len(data) >= 72, "too short")
    need(data[:4] == b"LSTG", "magic")
    version, kind, id_coding, value_bits = data[4:8]
    flags, rows, vocab_size, max_entries = struct.unpack_from("<IIII", data, 8)
    (num_entries,) = struct.unpack_from("<Q", data, 24)
    (temperature,) = struct.unpack_from("<d", data, 32)
    need(version == 1, "version")
    need(kind in (1, 2), "kind")
    need(flags < 8, "flags")
    need(1 <= vocab_size <= 2**31 - 1, "vocab_size")
    need(math.isfinite(temperature) and temperature > 0, "temperature")
    need(data[40:56] == bytes(16), "id table")
    if kind == 1:
        need(id_coding == 0 and value_bits in (16, 32), "coding")
        need(max_entries == 0 and num_entries == 0, "entries")
        bits = {"values": rows * vocab_size * value_bits}
    else:
        need(id_coding == 1 and value_bits in (5, 6, 7, 8, 16), "coding")
        need(1 <= max_entries <= vocab_size, "max_entries")
        need(rows > 0 or max_entries == 1, "max_entries of no rows")
        need(rows <= num_entries <= rows * max_entries, "num_entries")
        id_width = max(1, (vocab_size - 1).bit_length())
        bits = {
            "counts": rows * max_entries.bit_length(),
            "ids": num_entries * id_width,
            "ranges": rows * 16,
            "codes": num_entries * value_bits,
            "tail": rows * 32,
        }
    for number, name, width in ((1, "realized", 16), (2, "entropy", 16), (4, "log_z", 32)):
        if flags & number:
            bits[name] = rows * width
    nbytes = {name: (count + 31) // 32 * 4 for name, count in bits.items()}
    need(len(data) == 72 + sum(nbytes.values()), "length")
    digest = xxhash.xxh3_128_intdigest(data[:-16], seed=0).to_bytes(16, "big")
    need(digest == data[-16:], "digest")

    plane = {}
    offset = 56
    for name, size in nbytes.items():
        plane[name] = data[offset : offset + size]
        offset += size
        # A plane is one long number whose bit b is bit b % 32 of word b // 32.
        need(int.from_bytes(plane[name], "little") >> bits[name] == 0, f"padding of {name}")

    plain = Plain("dense" if kind == 1 else "top_k", vocab_size, temperature, value_bits)
    if "realized" in plane:
        plain.realized = [-code / 2048 for code in numbers(plane["realized"], rows, 16)]
    if "entropy" in plane:
        plain.entropy = [code / 2048 for code in numbers(plane["entropy"], rows, 16)]
    if "log_z" in plane:
        plain.log_z = list(struct.unpack(f"<{rows}f", plane["log_z"]))
        need(all(math.isfinite(value) for value in plain.log_z), "log_z")

    if kind == 1:
        values = numbers(plane["values"], rows * vocab_size, value_bits)
        for row in range(rows):
            words = values[row * vocab_size : (row + 1) * vocab_size]
            logprobs = [float_of_bits(word << (32 - value_bits)) for word in words]
            need(all(value < math.inf for value in logprobs), "not finite")  # nor NaN
            total = sum(exp(value) for value in logprobs)
            need(abs(total - 1) <= (0.25 if value_bits == 16 else 0.001), "sum")
            plain.logprobs.append(logprobs)
        return plain

    counts = numbers(plane["counts"], rows, max_entries.bit_length())
    need(sum(counts) == num_entries and all(counts), "counts")
    need(max(counts, default=1) == max_entries, "max_entries")
    ids = numbers(plane["ids"], num_entries, id_width)
    codes = numbers(plane["codes"], num_entries, value_bits)
    plain.ranges = numbers(plane["ranges"], rows, 16)
    plain.tail = list(struct.unpack(f"<{rows}f", plane["tail"]))
    first = 0
    for count, row_range, tail in zip(counts, plain.ranges, plain.tail, strict=True):
        row_ids, row_codes = ids[first : first + count], codes[first : first + count]
        first += count
        need(all(a < b for a, b in pairwise(row_ids)), "order of ids")
        need(row_ids[-1] < vocab_size, "id")
        # At 0 nothing is kept, and the entries would be at -inf.
        need(tail < 0, "tail")
        step = row_range / (256 * (2**value_bits - 1))
        below = [code * step for code in row_codes]
        mass = sum(exp(-x) for x in below)
        logprobs = [math.log(-math.expm1(tail)) - math.log(mass) - x for x in below]
        plain.ids.append(row_ids)
        plain.codes.append(row_codes)
        plain.logprobs.append([as_float32(value) for value in logprobs])
    return plain


def need(fine: bool, what: str) -> None:
    if not fine:
        raise Refused(what)


def numbers(plane: bytes, count: int, width: int) -> list[int]:
    """Bit j of number i is bit i * width + j of the plane."""
    string = int.from_bytes(plane, "little")
    return [string >> (i * width) & ((1 << width) - 1) for i in range(count)]


def float_of_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def as_float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
