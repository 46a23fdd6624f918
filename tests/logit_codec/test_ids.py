"""Id tables: their files, what they cost in bits, and that any ids come back through any table."""

import math
import struct

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logit_codec import (
    CodecError,
    IdTable,
    SampledSpec,
    SampledTargets,
    expected_inclusions,
    fit_id_table,
    select,
)
from logit_codec.bits import SPARE_NBYTES, BitString
from logit_codec.ids import code_ids, read_ids
from tests.golden import make
from tests.support import plain_reader


def with_digest(data: bytes | bytearray) -> bytes:
    body = bytes(data[:-16])
    return body + xxhash.xxh3_128_digest(body)


def random_sets(
    num_rows: int, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(E,) rows and ids of rows with 1 to V ids each."""
    kept = torch.rand(num_rows, vocab_size, generator=generator) < torch.rand(
        num_rows, 1, generator=generator
    )
    kept[torch.arange(num_rows), torch.randint(vocab_size, (num_rows,), generator=generator)] = True
    rows, ids = kept.nonzero(as_tuple=True)
    return rows, ids


def plane(words: Tensor, name: str) -> BitString:
    raw = words.numpy().tobytes()
    return BitString(np.frombuffer(raw + bytes(SPARE_NBYTES), np.uint8), 0, len(raw), name)


def through(table: IdTable, rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """The ids after they were written and read."""
    coded = code_ids(table, rows, ids, num_rows)
    occupancy, offsets = coded.planes()
    assert len(occupancy) + len(offsets) == coded.num_words

    def take_offsets(num_bits: int) -> BitString:
        assert num_bits == int(coded.widths.sum())
        return plane(offsets, "offsets")

    known = None if table.ids is None else table
    entries = read_ids(
        known, table.vocab_size, num_rows, len(ids), plane(occupancy, "occupancy"), take_offsets
    )
    assert entries.rows.tolist() == rows.tolist()
    assert entries.counts.tolist() == torch.bincount(rows, minlength=num_rows).tolist()
    assert entries.splits.tolist() == [0, *entries.counts.cumsum()]
    return torch.from_numpy(entries.ids)


@given(
    vocab_size=st.integers(1, 200),
    num_rows=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    skew=st.sampled_from((0.0, 1.0, 8.0)),
)
@settings(deadline=None, max_examples=100)
def test_any_sets_of_ids_come_back_through_any_table(vocab_size, num_rows, seed, skew):
    generator = torch.Generator().manual_seed(seed)
    rows, ids = random_sets(num_rows, vocab_size, generator)
    likely = torch.rand(vocab_size, generator=generator) ** skew * 10
    likely[torch.rand(vocab_size, generator=generator) < 0.3] = 0.0
    for table in (
        IdTable.identity(vocab_size, num_rows, len(ids)),
        fit_id_table(likely, 10),
        fit_id_table(torch.bincount(ids, minlength=vocab_size), num_rows),
    ):
        assert torch.equal(through(table, rows, ids, num_rows), ids)


@pytest.mark.parametrize("vocab_size", [2**31 - 1, 2**18, 262_145, 1])
def test_the_identity_covers_any_vocabulary_without_a_list_of_it(vocab_size):
    rows = torch.tensor([0, 0, 1]) if vocab_size > 1 else torch.tensor([0, 1])
    ids = torch.tensor([0, vocab_size - 1, vocab_size // 2])[: len(rows)]
    table = IdTable.identity(vocab_size, 2, len(ids))
    assert len(table.shifts) <= 2 * len(ids) / 2 + 1
    assert torch.equal(through(table, rows, ids, 2), ids)
    assert table.digest == bytes(16)
    with pytest.raises(ValueError, match="built in"):
        table.to_bytes()


@given(vocab_size=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_a_table_survives_its_file(vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    table = fit_id_table(torch.rand(vocab_size, generator=generator) ** 5, 1)
    data = table.to_bytes()
    read = IdTable.from_bytes(data)
    assert read.ids is not None
    assert torch.equal(read.ids, table.ids)
    assert torch.equal(read.shifts, table.shifts)
    assert read.digest == table.digest == data[-16:]
    plain = plain_reader.read_table(data)
    assert (plain.ids, plain.shifts) == (table.ids.tolist(), table.shifts.tolist())


def test_the_golden_table_is_written_and_read():
    data = (make.FOLDER / make.ID_TABLE).read_bytes()
    assert make.id_table().to_bytes() == data
    assert torch.equal(IdTable.from_bytes(data).ids, make.id_table().ids)


def small_table() -> bytes:
    return fit_id_table(torch.tensor([5.0, 0.1, 3.0, 0.0, 0.2, 0.3, 0.1]), 10).to_bytes()


def test_every_truncation_and_flipped_bit_of_a_table_is_refused():
    data = small_table()
    for length in range(len(data)):
        with pytest.raises(CodecError):
            IdTable.from_bytes(data[:length])
        with pytest.raises(CodecError):
            IdTable.from_bytes(with_digest(data[:length]) if length >= 16 else data[:length])
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            IdTable.from_bytes(changed)


def test_a_flipped_bit_under_a_fitting_digest_is_refused_or_read_as_the_format_says():
    data = small_table()
    for bit in range(8 * (len(data) - 16)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        changed = with_digest(changed)
        try:
            plain = plain_reader.read_table(changed)
        except plain_reader.Refused:
            with pytest.raises(CodecError):
                IdTable.from_bytes(changed)
        else:
            table = IdTable.from_bytes(changed)
            assert (table.ids.tolist(), table.shifts.tolist()) == (plain.ids, plain.shifts)


@pytest.mark.parametrize("vocab_size", [0, 2**20, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_stated_vocabulary_is_checked_against_the_bytes_first(vocab_size):
    changed = bytearray(small_table())
    struct.pack_into("<I", changed, 8, vocab_size)
    with pytest.raises(CodecError, match="its header implies"):
        IdTable.from_bytes(with_digest(changed))


@pytest.mark.parametrize(
    ("shifts", "ids", "why"),
    [
        ([1, 1], [0, 1, 2, 3, 4], "cover 5 ranks"),
        ([2, 1, 0], [0, 1, 2, 3, 4], "cover 5 ranks"),
        ([-1, 3], [0, 1, 2, 3, 4], "cover 5 ranks"),
        ([32], [0, 1, 2, 3, 4], "cover 5 ranks"),
        ([], [0, 1, 2, 3, 4], "cover 5 ranks"),
        ([3], [0, 1, 2, 3, 3], "permutation of 5"),
        ([3], [0, 1, 2, 3, 5], "permutation of 5"),
        ([3], [0, 1, 2, 3], "permutation of 5"),
    ],
)
def test_what_is_no_table_is_refused(shifts, ids, why):
    with pytest.raises(ValueError, match=why):
        IdTable(
            vocab_size=5,
            shifts=torch.tensor(shifts, dtype=torch.int64),
            ids=torch.tensor(ids, dtype=torch.int64),
        )


def test_repr_is_short():
    assert repr(IdTable.identity(100, 1, 1)) == "IdTable(identity, vocab_size=100, buckets=2)"
    assert make.id_table().digest.hex() in repr(make.id_table())


# What a table costs


def bits_per_entry(table: IdTable, rows: Tensor, ids: Tensor, num_rows: int) -> float:
    coded = code_ids(table, rows, ids, num_rows)
    return (coded.num_cells + len(ids) + int(coded.widths.sum())) / len(ids)


def zipf_rows(num_rows: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(V,) inclusion probabilities of a Zipf prior over shuffled ids; rows and ids of a sample."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(9))
    prior = torch.zeros(vocab_size, dtype=torch.float64)
    prior[order] = (3.0 / (torch.arange(vocab_size) + 3.0)).double()
    kept = torch.rand(num_rows, vocab_size, generator=generator) < prior
    kept[:, order[0]] = True
    rows, ids = kept.nonzero(as_tuple=True)
    return prior, rows, ids


def test_a_fitted_table_is_near_the_entropy_of_the_prior_and_far_below_the_identity():
    num_rows, vocab_size = 400, 30_000
    prior, rows, ids = zipf_rows(num_rows, vocab_size, 0)
    prior = prior.clamp(1e-9, 1 - 1e-9)
    entropy = torch.special.entr(prior) + torch.special.entr(1 - prior)
    floor = float(entropy.sum() / prior.sum()) / math.log(2)
    known = bits_per_entry(fit_id_table(prior * 1000, 1000), rows, ids, num_rows)
    identity = bits_per_entry(IdTable.identity(vocab_size, num_rows, len(ids)), rows, ids, num_rows)
    assert floor < known < 1.1 * floor
    assert known < identity - 1.5
    # Fitted to sets of ids that were seen in other rows, most of the vocabulary unseen.
    _, _, seen = zipf_rows(1000, vocab_size, 1)
    counts = torch.bincount(seen, minlength=vocab_size)
    assert int((counts == 0).sum()) > vocab_size // 3
    observed = bits_per_entry(fit_id_table(counts, 1000), rows, ids, num_rows)
    assert known < observed < 1.3 * floor


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 64, 100])
def test_the_buckets_are_the_cheapest_of_all_halvings(vocab_size):
    density = torch.rand(vocab_size, generator=torch.Generator().manual_seed(0)).double() ** 3
    table = fit_id_table(density * 100, 100)
    density = density.sort(descending=True).values.tolist()

    def cheapest(first: int, shift: int) -> float:
        if first >= vocab_size:
            return 0.0
        whole = 1 + sum(density[first : first + (1 << shift)]) * (1 + shift)
        if shift == 0:
            return whole
        half = 1 << (shift - 1)
        return min(whole, cheapest(first, shift - 1) + cheapest(first + half, shift - 1))

    cost, first = 0.0, 0
    for shift in table.shifts.tolist():
        cost += 1 + sum(density[first : first + (1 << shift)]) * (1 + shift)
        first += 1 << shift
    assert cost == pytest.approx(cheapest(0, (vocab_size - 1).bit_length()))


def test_expected_inclusions_are_what_many_draws_show():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 3
    expected = expected_inclusions(logits, num_draws=16, temperature=1.3)
    repeats = 400
    u = torch.arange(repeats, dtype=torch.float64).add(0.5).div(repeats).repeat_interleave(5)
    drawn = select(
        logits.repeat(repeats, 1),
        SampledSpec(16, realized=False),
        temperature=1.3,
        uniforms=u,
    )
    assert isinstance(drawn, SampledTargets)
    seen = torch.bincount(drawn.token_ids, minlength=300) / repeats
    assert float((seen - expected).abs().max()) < 5 * 2 / repeats


@pytest.mark.parametrize(
    ("inclusions", "num_rows", "why"),
    [
        (torch.tensor([1.0, -1.0]), 1, "at least 0"),
        (torch.tensor([1.0, math.nan]), 1, "finite"),
        (torch.ones(2, 2), 1, r"\(V,\)"),
        (torch.ones(2), 0, "num_rows must be at least 1, got 0"),
    ],
)
def test_fitting_refuses_what_is_no_count(inclusions, num_rows, why):
    with pytest.raises(ValueError, match=why):
        fit_id_table(inclusions, num_rows)
