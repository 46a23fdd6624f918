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
    num_draws: int = 0
    counts: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    ranges: list[int] = field(default_factory=list)
    codes: list[list[int]] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    ranks: list[list[int]] | None = None
    layers: list[int] = field(default_factory=list)
    states: list[list[float]] = field(default_factory=list)
    """The values of each row, of features the layers one after the other."""
    scale: list[float] = field(default_factory=list)
    head: bytes = b""
    realized: list[float] | None = None
    entropy: list[float] | None = None
    log_z: list[float] | None = None


@dataclass
class Table:
    """An id table as Python numbers."""

    vocab_size: int
    shifts: list[int]
    ids: list[int] | range


def read_table(data: bytes) -> Table:
    """The content of an id table's file."""
    need(len(data) >= 32, "too short")
    magic, version, vocab_size, buckets = struct.unpack_from("<4sB3xII", data)
    need(magic == b"LSTI" and version == 1 and data[5:8] == bytes(3), "table header")
    need(1 <= vocab_size <= 2**31 - 1, "vocab_size")
    width = max(1, (vocab_size - 1).bit_length())
    first = 16 + (buckets + 3) // 4 * 4
    last = first + (vocab_size * width + 31) // 32 * 4
    need(len(data) == last + 16, "length")
    need(
        xxhash.xxh3_128_intdigest(data[:last], seed=0).to_bytes(16, "big") == data[last:], "digest"
    )
    need(not any(data[16 + buckets : first]), "padding of shifts")
    need(int.from_bytes(data[first:last], "little") >> vocab_size * width == 0, "padding of ids")
    shifts = list(data[16 : 16 + buckets])
    ids = numbers(data[first:last], vocab_size, width)
    need(sorted(ids) == list(range(vocab_size)), "permutation")
    need(all(shift <= 31 for shift in shifts), "shifts")
    sizes = [1 << shift for shift in shifts]
    need(0 < vocab_size <= sum(sizes) and sum(sizes[:-1]) < vocab_size, "cover")
    return Table(vocab_size, shifts, ids)


KINDS = ("dense", "top_k", "sampled", "given_ids", "realized", "hidden", "features")
WIDTHS = ((16, 32), (5, 6, 7, 8, 16), (0,), (16, 32), (32,), (8, 16), (16,))


def read(
    data: bytes,
    tables: dict[bytes, Table] | None = None,
    given_ids: list[list[int]] | None = None,
) -> Plain:
    """The content of one container; raises Refused for what the page says is malformed.

    tables: id tables by digest. given_ids: what the client asked for, row by row.
    """
    need(len(data) >= 72 and len(data) % 4 == 0, "size")
    need(data[:4] == b"LSTG", "magic")
    version, kind, id_coding, value_bits = data[4:8]
    flags, rows, vocab_size, max_entries = struct.unpack_from("<IIII", data, 8)
    (num_entries,) = struct.unpack_from("<Q", data, 24)
    (temperature,) = struct.unpack_from("<d", data, 32)
    need(version == 1, "version")
    need(1 <= kind <= len(KINDS), "kind")
    need(flags < {4: 16, 5: 1}.get(kind, 8), "flags")
    need(1 <= vocab_size <= 2**31 - 1, "vocab_size")
    need(math.isfinite(temperature) and temperature > 0, "temperature")
    need(id_coding in ((1, 2) if kind in (2, 3) else (0,)), "coding")
    need(value_bits in WIDTHS[kind - 1], "value_bits")
    need(id_coding == 2 or kind in (4, 6) or data[40:56] == bytes(16), "what is needed")
    if kind in (1, 5):
        need(max_entries == 0 and num_entries == 0, "entries")
    elif kind in (6, 7):
        need(1 <= max_entries < 2**31, "size of a state")
        need(num_entries == 0 if kind == 6 else 1 <= num_entries <= 64, "layers")
    elif kind == 4:
        check_given(given_ids, data[40:56], rows, vocab_size, max_entries, num_entries)
    else:
        if kind == 2:
            need(1 <= max_entries <= vocab_size, "max_entries")
            need(rows > 0 or max_entries == 1, "max_entries of no rows")
        else:
            need(1 <= max_entries <= 65536, "draws")
        most = min(max_entries, vocab_size)
        need(rows <= num_entries <= rows * most, "num_entries")
    digest = xxhash.xxh3_128_intdigest(data[:-16], seed=0).to_bytes(16, "big")
    need(digest == data[-16:], "digest")

    # What is known from the header alone has to be there before anything else is looked at.
    end_bits = {"tail": rows * 32} if kind == 2 else {"scale": rows * 16} if value_bits == 8 else {}
    if kind == 4:
        end_bits["tail"] = rows * 32
        if flags & 8:
            end_bits["ranks"] = num_entries * max(1, (vocab_size - 1).bit_length())
    for number, name, width in ((1, "realized", 16), (2, "entropy", 16), (4, "log_z", 32)):
        if flags & number:
            end_bits[name] = rows * width
    body = Planes(data[56:-16], sum(map(nbytes, end_bits.values())))
    plain = Plain(KINDS[kind - 1], vocab_size, temperature, value_bits)
    if kind == 1:
        read_dense(plain, body, rows)
    elif kind == 4:
        plain.ids = given_ids or []
        values = numbers(body.take(num_entries * value_bits, "values"), num_entries, value_bits)
        values = [float_of_bits(v) if value_bits == 32 else -v / 512 for v in values]
        plain.logprobs = divide(values, plain.ids)
    elif kind == 5:
        values = numbers(body.take(rows * 32, "logprobs"), rows, 32)
        plain.realized = [float_of_bits(value) for value in values]
        need(all(value <= 0.001 for value in plain.realized), "logprob")  # nor NaN
    elif kind in (6, 7):
        read_states(plain, body, rows, max_entries, num_entries)
        plain.head = data[40:56] if kind == 6 else b""
    else:
        if id_coding == 1:
            need(nbytes(rows * most.bit_length()) <= body.spare(), "counts")
            counts = numbers(body.take(rows * most.bit_length(), "counts"), rows, most.bit_length())
            need(sum(counts) == num_entries and all(counts), "counts")
            width = max(1, (vocab_size - 1).bit_length())
            ids = numbers(body.take(num_entries * width, "ids"), num_entries, width)
            for count in counts:
                plain.ids.append(ids[:count])
                ids = ids[count:]
        else:
            plain.ids = read_elias_fano(
                body, data[40:56], tables or {}, rows, vocab_size, num_entries
            )
        need(all(len(row) for row in plain.ids), "empty row")
        need(all(a < b for row in plain.ids for a, b in pairwise(row)), "order of ids")
        need(all(row[-1] < vocab_size for row in plain.ids), "id")
        if kind == 2:
            need(max(map(len, plain.ids), default=1) == max_entries, "max_entries")
            read_codes(plain, body, len(data) - 72 - len(body.rest))
        else:
            plain.num_draws = max_entries
            read_draws(plain, body, len(data) - 72 - len(body.rest))
    need(body.spare() == 0, "length")
    body.reserved = 0
    plane = {name: body.take(size, name) for name, size in end_bits.items()}
    if kind in (2, 4):
        plain.tail = list(struct.unpack(f"<{rows}f", plane["tail"]))
        check_masses(plain) if kind == 4 else read_logprobs(plain)
    if "scale" in plane:
        plain.scale = [float_of_bits(code << 16) for code in numbers(plane["scale"], rows, 16)]
        need(all(0 <= value < math.inf for value in plain.scale), "scale")
    if "ranks" in plane:
        width = max(1, (vocab_size - 1).bit_length())
        ranks = numbers(plane["ranks"], num_entries, width)
        need(all(rank < vocab_size for rank in ranks), "rank")
        plain.ranks = divide(ranks, plain.ids)
    if "realized" in plane:
        plain.realized = [-code / 2048 for code in numbers(plane["realized"], rows, 16)]
    if "entropy" in plane:
        plain.entropy = [code / 2048 for code in numbers(plane["entropy"], rows, 16)]
    if "log_z" in plane:
        plain.log_z = list(struct.unpack(f"<{rows}f", plane["log_z"]))
        need(all(math.isfinite(value) for value in plain.log_z), "log_z")
    return plain


@dataclass
class Planes:
    """The planes of a container, taken off one by one."""

    rest: bytes
    reserved: int
    """Bytes at the end that the planes of numbers per row take."""

    def spare(self) -> int:
        return len(self.rest) - self.reserved

    def take(self, num_bits: int, name: str) -> bytes:
        """The next plane, of so many bits and the padding to whole words."""
        need(nbytes(num_bits) <= self.spare(), f"{name} ends")
        plane, self.rest = self.rest[: nbytes(num_bits)], self.rest[nbytes(num_bits) :]
        # A plane is one long number whose bit b is bit b % 32 of word b // 32.
        need(int.from_bytes(plane, "little") >> num_bits == 0, f"padding of {name}")
        return plane


def read_dense(plain: Plain, body: Planes, rows: int) -> None:
    vocab_size, value_bits = plain.vocab_size, plain.value_bits
    plane = body.take(rows * vocab_size * value_bits, "values")
    values = numbers(plane, rows * vocab_size, value_bits)
    for row in range(rows):
        words = values[row * vocab_size : (row + 1) * vocab_size]
        logprobs = [float_of_bits(word << (32 - value_bits)) for word in words]
        need(all(value < math.inf for value in logprobs), "not finite")  # nor NaN
        total = sum(exp(value) for value in logprobs)
        need(abs(total - 1) <= (0.25 if value_bits == 16 else 0.001), "sum")
        plain.logprobs.append(logprobs)


def check_given(
    ids: list[list[int]] | None, digest: bytes, rows: int, vocab_size: int, most: int, entries: int
) -> None:
    """The header fits the ids that the client asked for."""
    need(ids is not None, "no given ids")
    flat = [token_id for row in ids for token_id in row]
    named = struct.pack(f"<{rows + len(flat)}i", *map(len, ids), *flat) if rows == len(ids) else b""
    need(rows == len(ids), "rows of given ids")
    own = xxhash.xxh3_128_intdigest(named, seed=0).to_bytes(16, "big")
    need(own == digest, "digest of given ids")
    need(entries == len(flat) and most == max(map(len, ids), default=1), "sizes of given ids")
    need(most <= vocab_size and all(token_id < vocab_size for token_id in flat), "given id")


def check_masses(plain: Plain) -> None:
    for logprobs, tail in zip(plain.logprobs, plain.tail, strict=True):
        need(all(value < math.inf for value in logprobs) and tail <= 0, "not finite")  # nor NaN
        total = sum(map(exp, logprobs)) + exp(tail)
        need(abs(total - 1) <= (0.004 if plain.value_bits == 16 else 0.001), "sum")


def read_states(plain: Plain, body: Planes, rows: int, size: int, layers: int) -> None:
    if layers:
        plain.layers = numbers(body.take(layers * 32, "layers"), layers, 32)
        need(all(a < b for a, b in pairwise(plain.layers)), "order of layers")
        need(plain.layers[-1] <= 1_000_000, "layer")
    size *= layers or 1
    width = plain.value_bits
    values = numbers(body.take(rows * size * width, "values"), rows * size, width)
    if width == 8:
        values = [value - 256 * (value > 127) for value in values]
    else:
        values = [float_of_bits(value << 16) for value in values]
        need(all(map(math.isfinite, values)), "states")
    plain.states = [values[row * size : (row + 1) * size] for row in range(rows)]


def divide(values: list, ids: list[list[int]]) -> list[list]:
    """Values of all entries, row by row."""
    rows, first = [], 0
    for row in ids:
        rows.append(values[first : first + len(row)])
        first += len(row)
    return rows


def read_elias_fano(
    body: Planes,
    digest: bytes,
    tables: dict[bytes, Table],
    rows: int,
    vocab_size: int,
    entries: int,
) -> list[list[int]]:
    """The ids of each row, ascending."""
    if digest == bytes(16):
        shift = (vocab_size * rows // entries).bit_length() - 1 if rows else 0
        size = 1 << shift
        buckets = (vocab_size + size - 1) // size
        need(nbytes(rows * buckets + entries) <= body.spare(), "occupancy ends")
        table = Table(vocab_size, [shift] * buckets, range(vocab_size))
    else:
        need(digest in tables, "unknown table")
        table = tables[digest]
        need(table.vocab_size == vocab_size, "table of another vocabulary")
        buckets = len(table.shifts)
    num_bits = rows * buckets + entries
    string = int.from_bytes(body.take(num_bits, "occupancy"), "little")
    found = []  # row and bucket of each entry
    cell = 0
    for bit in range(num_bits):  # a one is an entry of this cell, a zero goes on to the next cell
        if string >> bit & 1:
            need(cell < rows * buckets, "beyond the last cell")
            found.append((cell // buckets, cell % buckets))
        else:
            cell += 1
    need(len(found) == entries, "entries")
    widths = [table.shifts[bucket] for _, bucket in found]
    offsets = int.from_bytes(body.take(sum(widths), "offsets"), "little")
    ranks = [[] for _ in range(rows)]
    for (row, bucket), width in zip(found, widths, strict=True):
        start = sum(1 << shift for shift in table.shifts[:bucket])
        ranks[row].append(start + (offsets & ((1 << width) - 1)))
        offsets >>= width
    for row in ranks:
        need(all(a < b for a, b in pairwise(row)), "order of ranks")
        need(all(rank < vocab_size for rank in row), "rank")
    return [sorted(table.ids[rank] for rank in row) for row in ranks]


def read_codes(plain: Plain, body: Planes, id_nbytes: int) -> None:
    """Ranges and codes: places of the best entries, flags level by level, lower bits."""
    rows = len(plain.ids)
    plain.ranges = numbers(body.take(rows * 8, "ranges"), rows, 8)
    string = String(plain, body, "codes", id_nbytes)
    best = [string.next_bits((len(row) - 1).bit_length()) for row in plain.ids]
    need(all(b < len(row) for b, row in zip(best, plain.ids, strict=True)), "best")
    plain.codes = [[0] * len(row) for row in plain.ids]
    others = [
        (row, place)
        for row, of_row in enumerate(plain.codes)
        for place in range(len(of_row))
        if place != best[row]
    ]
    low_bits = plain.value_bits - 3
    alive = others
    for _ in range(7):
        alive = [entry for entry in alive if string.next_bits(1)]
        for row, place in alive:
            plain.codes[row][place] += 1 << low_bits
    for row, place in others:
        plain.codes[row][place] += string.next_bits(low_bits)
    for row, place in enumerate(best):
        plain.codes[row][place] = 2**plain.value_bits - 1
    string.end()


def read_logprobs(plain: Plain) -> None:
    most = 2**plain.value_bits - 1
    for codes, row_range, tail in zip(plain.codes, plain.ranges, plain.tail, strict=True):
        # At 0 nothing is kept, and the entries would be at -inf.
        need(tail < 0, "tail")
        nats = 2 ** ((row_range - 127) / 16) if row_range else 0.0
        below = [nats * (1 - math.log(1 + (math.e - 1) * code / most)) for code in codes]
        mass = sum(exp(-x) for x in below)
        logprobs = [math.log(-math.expm1(tail)) - math.log(mass) - x for x in below]
        plain.logprobs.append([as_float32(value) for value in logprobs])


class String:
    """A plane that is one string of bits whose length shows only when it is read."""

    def __init__(self, plain: Plain, body: Planes, name: str, id_nbytes: int) -> None:
        self.least = (sum(map(len, plain.ids)) + 3) // 4 * 4 - id_nbytes
        self.num_bits = 8 * body.spare()
        self.name = name
        self.string = int.from_bytes(body.take(self.num_bits, name), "little")
        self.at = 0

    def next_bits(self, count: int) -> int:
        self.at += count
        need(self.at <= self.num_bits, f"{self.name} end")
        return self.string >> (self.at - count) & ((1 << count) - 1)

    def end(self) -> None:
        need(max(nbytes(self.at), self.least) == self.num_bits // 8, f"length of {self.name}")
        need(self.string >> self.at == 0, f"padding of {self.name}")


def read_draws(plain: Plain, body: Planes, id_nbytes: int) -> None:
    """Counts: a string of flags, level by level, and then the bits below each leading one."""
    string = String(plain, body, "draws", id_nbytes)
    next_bits = string.next_bits
    counts = [[1 + next_bits(1) for _ in row] for row in plain.ids]  # 2 stands for "or more"
    stated = [
        (row, place)
        for row, of_row in enumerate(counts)
        for place in [i for i, count in enumerate(of_row) if count == 2][1:]
    ]
    length = dict.fromkeys(stated, 1)
    alive = stated
    for level in range(2, 17):
        if 2**level <= plain.num_draws:
            alive = [entry for entry in alive if next_bits(1)]
            for entry in alive:
                length[entry] = level
    for row, place in stated:
        counts[row][place] = 2 ** length[row, place] + next_bits(length[row, place])
    string.end()
    for of_row in counts:
        several = [place for place, count in enumerate(of_row) if count > 1]
        if several:
            first = several[0]
            of_row[first] = plain.num_draws - (sum(of_row) - 2)
            need(of_row[first] >= 2, "implied count")
        need(sum(of_row) == plain.num_draws, "sum of counts")
    plain.counts = counts


def nbytes(num_bits: int) -> int:
    """Bytes of the whole words that so many bits take."""
    return (num_bits + 31) // 32 * 4


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
