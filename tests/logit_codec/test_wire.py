"""The container: what comes back, which bytes are written, and that hostile bytes are refused."""

import ast
import itertools
import math
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import logit_codec
from logit_codec import (
    FORMAT_VERSION,
    CodecError,
    DenseSpec,
    DenseTargets,
    FeaturesSpec,
    FeaturesTargets,
    GivenIds,
    GivenIdsSpec,
    GivenIdsTargets,
    HiddenSpec,
    HiddenTargets,
    IdTable,
    RealizedSpec,
    RealizedTargets,
    SampledSpec,
    SampledTargets,
    SparseTargets,
    Targets,
    TargetSpec,
    TopKSpec,
    TopKTargets,
    decode,
    decode_parts,
    encode,
    encode_parts,
    fit_id_table,
    parse_targets,
    select,
)
from logit_codec.codes import CODE_BITS
from logit_codec.id_table import identity_shift, num_identity_buckets
from tests.golden import make
from tests.support import codec_oracle as oracle
from tests.support import plain_reader

OVERHEAD = 72
INF = math.inf


def with_digest(data: bytes | bytearray) -> bytes:
    """The container with a digest that fits: what an attacker sends."""
    body = bytes(data[:-16])
    return body + xxhash.xxh3_128_digest(body)


def with_field(data: bytes, offset: int, layout: str, value: float) -> bytes:
    changed = bytearray(data)
    struct.pack_into("<" + layout, changed, offset, value)
    return with_digest(changed)


def random_targets(
    spec: TargetSpec, num_rows: int, vocab_size: int, *, seed=0, scale=4.0, temperature=1.0
) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * scale
    realized = torch.randint(vocab_size, (num_rows,), generator=generator)
    uniforms = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    given = torch.randint(-1, vocab_size, (num_rows, MOST_GIVEN), generator=generator)
    given[:, :1].clamp_(min=0)
    num_layers = len(spec.feature_layers) or 1
    features = torch.randn(num_rows, num_layers, STATE_SIZE, generator=generator)
    return select(
        logits,
        completed(spec),
        temperature=temperature,
        uniforms=uniforms,
        realized_ids=realized,
        given_ids=given,
        hidden=features[:, 0],
        features=features,
    )


MOST_GIVEN, STATE_SIZE = 6, 5


def completed(spec: TargetSpec) -> TargetSpec:
    """As a service completes it for the rows of `random_targets`."""
    return spec.for_rows(MOST_GIVEN).for_head(make.HEAD, STATE_SIZE)


def given_of(targets: Targets) -> GivenIds | None:
    """What decode needs beside the bytes of these targets."""
    return targets.given if isinstance(targets, GivenIdsTargets) else None


def random_table(vocab_size: int, seed: int = 0) -> IdTable:
    generator = torch.Generator().manual_seed(seed)
    return fit_id_table(torch.rand(vocab_size, generator=generator) ** 9 * 10, 10)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, so that -0.0 is not 0.0."""
    raw = [value.contiguous().reshape(-1).view(torch.uint8) for value in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


# Round trip


def check_round_trip(targets: Targets, bits: int, table: IdTable | None = None) -> Targets:
    """Everything that FORMAT.md promises about decode(encode(targets))."""
    data = encode(targets, bits=bits, id_table=table)
    decoded = decode(data, id_tables=[] if table is None else [table], given_ids=given_of(targets))
    assert type(decoded) is type(targets)
    assert (decoded.vocab_size, decoded.temperature) == (targets.vocab_size, targets.temperature)
    assert decoded._tensors().keys() == targets._tensors().keys()
    if targets.log_z is not None:
        assert same_bits(decoded.log_z, targets.log_z)
    if isinstance(targets, RealizedTargets):
        assert same_bits(decoded.realized_logprob, targets.realized_logprob)
        return decoded
    for name in ("realized_logprob", "entropy"):
        value = getattr(targets, name)
        if value is not None:
            expected = value.clamp(-0xFFFF / 2048, 0xFFFF / 2048)
            assert (getattr(decoded, name) - expected).abs().le(1 / 4096 + 1e-6).all()
    if isinstance(targets, DenseTargets):
        assert same_bits(decoded.logprobs, targets.logprobs)
        return decoded
    if isinstance(targets, HiddenTargets | FeaturesTargets):
        for name in ("values", "scale", "hidden"):
            if name in targets._tensors():
                assert same_bits(getattr(decoded, name), getattr(targets, name)), name
        for name in ("layers", "head_fingerprint"):
            assert getattr(decoded, name, None) == getattr(targets, name, None)
        return decoded
    assert torch.equal(decoded.token_ids, targets.token_ids)
    assert torch.equal(decoded.row_splits, targets.row_splits)
    if isinstance(targets, SampledTargets):
        assert decoded.num_draws == targets.num_draws
        assert torch.equal(decoded.counts, targets.counts)
        return decoded
    assert same_bits(decoded.tail_logprob, targets.tail_logprob)
    if isinstance(targets, GivenIdsTargets):
        if targets.ranks is not None:
            assert torch.equal(decoded.ranks, targets.ranks)
        if bits == 32:
            assert same_bits(decoded.logprobs, targets.logprobs)
        else:
            expected = targets.logprobs.clamp(-0xFFFF / 512, 0)
            assert (decoded.logprobs - expected).abs().le(1 / 1024 + 1e-5).all()
        return decoded
    rows = zip(
        oracle.row_logprobs(decoded),
        oracle.row_logprobs(targets),
        targets.tail_logprob,
        strict=True,
    )
    for got, wanted, tail in rows:
        # FORMAT.md's bound: half a step at the low end, and as much for normalising.
        row_range = float(wanted.max() - wanted.min())
        row_range = max(2 ** (1 / 16) * row_range, 2 ** (-126 / 16)) if row_range else 0.0
        bound = (math.e - 1) * row_range / (2**bits - 1)
        # Beside the bound: the float32 of what went in and of what came out.
        slack = 4e-6 + 1e-6 * wanted.abs()
        assert ((got - wanted).abs() <= bound + slack).all()
        kept = -math.expm1(float(tail))
        assert float(got.exp().sum()) == pytest.approx(kept, rel=2e-6)
    return decoded


NEW_KINDS = ("given_ids", "realized", "hidden", "features")
FLAGS = {"realized": st.booleans(), "entropy": st.booleans(), "log_z": st.booleans()}


@given(
    data=st.data(),
    vocab_size=st.integers(1, 70),
    num_rows=st.integers(0, 12),
    temperature=st.floats(0.1, 10.0),
    scale=st.sampled_from((0.0, 0.01, 1.0, 5.0, 10.0)),
    flags=st.fixed_dictionaries(FLAGS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=100)
def test_what_is_encoded_is_decoded(data, vocab_size, num_rows, temperature, scale, flags, seed):
    kind = data.draw(st.sampled_from(("top_k", "min_p", "sampled", "dense", *NEW_KINDS)))
    table = data.draw(st.sampled_from((None, random_table(vocab_size, seed))))
    bits = data.draw(st.sampled_from(CODE_BITS))
    if kind == "dense":
        spec = DenseSpec(data.draw(st.sampled_from((16, 32))), **flags)
    elif kind == "sampled":
        spec = SampledSpec(data.draw(st.integers(1, 20) | st.sampled_from((64, 1000))), **flags)
    elif kind == "given_ids":
        bits = data.draw(st.sampled_from((16, 32)))
        spec = GivenIdsSpec(bits, ranks=data.draw(st.booleans()), **flags)
    elif kind == "realized":
        spec = RealizedSpec()
    elif kind == "hidden":
        spec = HiddenSpec(data.draw(st.sampled_from((8, 16))), **flags)
    elif kind == "features":
        layers = data.draw(st.sets(st.integers(0, 40), min_size=1, max_size=5))
        spec = FeaturesSpec(tuple(sorted(layers)), **flags)
    else:
        k = data.draw(st.integers(1, vocab_size))
        min_p = 0.0 if kind == "top_k" else data.draw(st.sampled_from((1e-6, 0.01, 0.3)))
        spec = TopKSpec(k, min_p=min_p, bits=bits, **flags)
    targets = random_targets(
        spec, num_rows, vocab_size, seed=seed, scale=scale * temperature, temperature=temperature
    )
    decoded = check_round_trip(targets, bits, table)
    check_round_trip(decoded, bits, table)
    encoded = encode(targets, bits=bits, id_table=table)
    if kind in NEW_KINDS:
        assert encode(decoded, bits=bits) == encoded
    assert_agrees_with_the_plain_reader(encoded, table, given_of(targets))


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("text", ["top_k:64", "top_k:min_p=1/256,max_k=128"])
def test_what_is_encoded_is_decoded_at_the_size_of_a_real_vocabulary(text, bits):
    spec = replace(parse_targets(text), bits=bits, entropy=True)
    check_round_trip(random_targets(spec, 50, 32003), bits)
    check_round_trip(random_targets(spec, 2, 262_144, scale=0.001), bits)


@pytest.mark.parametrize("span", [0.1, 1.0, 10.0, 30.0, 60.0])
def test_16_bits_are_within_a_thousandth_of_a_nat_for_rows_of_up_to_60_nats(span):
    logits = torch.rand(20, 1000, generator=torch.Generator().manual_seed(0)) * span
    logits[:, 0], logits[:, 1] = 0.0, span
    targets = select(logits, TopKSpec(1000, realized=False))
    decoded = check_round_trip(targets, 16)
    assert (decoded.logprobs - targets.logprobs).abs().max() <= 1e-3


def test_the_bounds_that_the_format_names_for_10_nats():
    logits = torch.linspace(0.0, 10.0, 64)[None].repeat(3, 1)
    targets = select(logits, TopKSpec(64, realized=False))
    for bits, bound in ((7, 0.14), (16, 0.00028)):
        decoded = decode(encode(targets, bits=bits))
        assert (decoded.logprobs - targets.logprobs).abs().max() <= bound


def test_what_lies_further_below_the_best_entry_than_a_range_can_say_comes_back_at_its_end():
    logits = torch.tensor([[0.0, -1.0, -255.0, -300.0]])
    decoded = decode(encode(select(logits, TopKSpec(4, realized=False)), bits=16))
    below = decoded.logprobs[0] - decoded.logprobs
    torch.testing.assert_close(below, torch.tensor([0.0, 1.0, 255.0, 256.0]), rtol=0, atol=4e-3)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_most_likely_entry_stays_the_most_likely(bits):
    targets = random_targets(TopKSpec(64, realized=False), 50, 1000)
    decoded = decode(encode(targets, bits=bits))
    rows = zip(oracle.row_logprobs(decoded), oracle.row_logprobs(targets), strict=True)
    for got, wanted in rows:
        assert got[wanted.argmax()] == got.max()


def test_a_realized_logprob_out_of_range_saturates():
    targets = replace(
        random_targets(TopKSpec(2), 5, 11),
        realized_logprob=torch.tensor([-INF, -32.0, -31.9995, -31.999, 0.0]),
    )
    smallest = -0xFFFF / 2048
    decoded = decode(encode(targets)).realized_logprob.tolist()
    assert decoded == [smallest, smallest, smallest, -65534 / 2048, 0.0]


def test_a_tail_of_minus_inf_stays_and_the_entries_hold_everything():
    targets = random_targets(TopKSpec(11, realized=False), 5, 11)
    decoded = decode(encode(targets, bits=5))
    assert decoded.tail_logprob.tolist() == [-INF] * 5
    torch.testing.assert_close(decoded.to_dense().sum(1), torch.ones(5))


def test_no_rows_take_the_overhead_only():
    texts = ("top_k:3,entropy=1", "sampled:5", "dense:f32,entropy=1", "dense:bf16")
    more = ("given_ids:ranks=1", "realized", "hidden:int8", "features:layers=1+4")
    for text in texts + more:
        targets = random_targets(parse_targets(text), 3, 11)[:0]
        data = encode(targets)
        assert len(data) == OVERHEAD + (8 if text.startswith("features") else 0)
        decoded = decode(data, given_ids=given_of(targets))
        assert len(decoded) == 0
        assert decoded._tensors().keys() == targets._tensors().keys()


def test_a_vocabulary_of_one_id_is_encoded():
    for spec in (TopKSpec(1, entropy=True), DenseSpec(32), DenseSpec(16)):
        decoded = check_round_trip(random_targets(spec, 5, 1), spec.bits)
        torch.testing.assert_close(decoded.to_dense(), torch.ones(5, 1))


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from(CODE_BITS), k=st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_encoding_again_changes_nothing_but_the_quantised_logprobs(seed, bits, k):
    """The decoded span may be a float32 rounding above its range, so the range may grow by one."""
    targets = random_targets(TopKSpec(k, entropy=True), 10, 30, seed=seed)
    once = decode(encode(targets, bits=bits))
    twice = decode(encode(once, bits=bits))
    for name in once._tensors():
        if name != "logprobs":
            assert same_bits(getattr(twice, name), getattr(once, name)), name
    rows = zip(oracle.row_logprobs(twice), oracle.row_logprobs(once), strict=True)
    for got, wanted in rows:
        row_range = math.ceil(256 * float(wanted.max() - wanted.min())) + 1
        assert (got - wanted).abs().max() <= row_range / (256 * (2**bits - 1)) + 4e-6


@pytest.mark.parametrize("bits", [16, 32])
def test_encoding_dense_again_writes_the_same_bytes(bits):
    data = encode(random_targets(DenseSpec(bits, entropy=True), 7, 11))
    assert encode(decode(data)) == data


def test_a_container_is_read_from_anything_that_holds_bytes():
    data = encode(random_targets(TopKSpec(4), 3, 11))
    expected = decode(data).logprobs
    aligned = torch.frombuffer(bytearray(data), dtype=torch.int32).numpy()
    shifted = memoryview(b"x" + data)[1:]
    for other in (bytearray(data), memoryview(data), aligned, shifted):
        assert torch.equal(decode(other).logprobs, expected)


def test_decoded_targets_do_not_hang_on_the_bytes_they_came_from():
    specs = (TopKSpec(4), DenseSpec(32), SampledSpec(4, log_z=True), GivenIdsSpec(32))
    for spec in (*specs, RealizedSpec(), HiddenSpec(8), HiddenSpec(16), FeaturesSpec((1, 2))):
        targets = random_targets(spec, 3, 11)
        data = bytearray(encode(targets, bits=spec.code_bits))
        decoded = decode(data, given_ids=given_of(targets))
        before = {name: value.clone() for name, value in decoded._tensors().items()}
        data[:] = bytes(len(data))
        assert all(torch.equal(getattr(decoded, name), before[name]) for name in before)


def test_strided_tensors_are_encoded_by_their_values():
    targets = random_targets(DenseSpec(32), 6, 11)
    wide = torch.stack([targets.logprobs, targets.logprobs * 0], 2)[:, :, 0]
    log_z = torch.stack([targets.log_z, targets.log_z * 0], 1)[:, 0]
    assert encode(replace(targets, logprobs=wide, log_z=log_z)) == encode(targets)


@pytest.mark.parametrize(
    ("text", "most_per_row"),
    [("realized", 4.5), ("given_ids", 44.0), ("hidden:int8", 2304 + 6.0)],
)
def test_a_thousand_rows_take_few_bytes_with_everything_included(text, most_per_row):
    """given_ids: 16 ids, their tail, log Z and the realized logprob. hidden: D = 2,304."""
    spec = parse_targets(text).for_rows(16).for_head(make.HEAD, 2304)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 1001, generator=generator)
    targets = select(
        logits,
        spec,
        realized_ids=torch.arange(1000),
        given_ids=logits.topk(16).indices,
        hidden=torch.randn(1000, 2304, generator=generator),
    )
    data = encode(targets, bits=spec.code_bits)
    assert len(data) / 1000 <= most_per_row
    assert len(decode(data, given_ids=given_of(targets))) == 1000
    # What admission reckons with is an upper bound, and not far above.
    assert len(data) - OVERHEAD <= 1000 * spec.max_row_nbytes(1001) <= 1.01 * len(data)


def test_decoded_memory_is_at_most_what_a_spec_says_of_a_row():
    for text in (
        *("given_ids:ranks=1,entropy=1", "given_ids:bits=32", "realized"),
        *("hidden:int8", "hidden:bf16,realized=0", "features:layers=1+4,log_z=1"),
    ):
        spec = completed(parse_targets(text))
        for num_rows in (1, 20):
            targets = random_targets(spec, num_rows, 1001)
            data = encode(targets, bits=spec.code_bits)
            decoded = decode(data, given_ids=given_of(targets))
            assert decoded.nbytes <= num_rows * spec.max_decoded_row_nbytes(1001), text


# Golden bytes and the second reader


def assert_agrees_with_the_plain_reader(
    data: bytes, table: IdTable | None = None, given: GivenIds | None = None
) -> None:
    """Both read the same, or both refuse."""
    tables, plain_tables = [], {}
    if table is not None:
        tables = [table]
        plain_tables = {table.digest: plain_reader.read_table(table.to_bytes())}
    plain_given = None
    if given is not None:
        plain_given = [ids.tolist() for ids in given.token_ids.split(given.sizes.tolist())]
    try:
        plain = plain_reader.read(data, plain_tables, plain_given)
    except plain_reader.Refused:
        with pytest.raises(CodecError):
            decode(data, id_tables=tables, given_ids=given)
        return
    targets = decode(data, id_tables=tables, given_ids=given)
    assert (targets.kind, targets.vocab_size) == (plain.kind, plain.vocab_size)
    assert targets.temperature == plain.temperature
    for name, value in (
        ("realized_logprob", plain.realized),
        ("entropy", plain.entropy),
        ("log_z", plain.log_z),
    ):
        got = getattr(targets, name)
        assert (None if got is None else got.tolist()) == value
    if isinstance(targets, SparseTargets):
        assert oracle.kept_ids(targets) == plain.ids
    if isinstance(targets, SampledTargets):
        assert targets.num_draws == plain.num_draws
        assert targets.counts.tolist() == [count for row in plain.counts for count in row]
        return
    if isinstance(targets, RealizedTargets):
        return
    if isinstance(targets, HiddenTargets):
        assert targets.values.tolist() == plain.states
        assert (targets.scale.tolist() if targets.scale is not None else []) == plain.scale
        assert targets.head_fingerprint == plain.head.hex()
        return
    if isinstance(targets, FeaturesTargets):
        assert targets.hidden.flatten(1).tolist() == plain.states
        assert list(targets.layers) == plain.layers
        return
    if isinstance(targets, GivenIdsTargets) and targets.ranks is not None:
        assert targets.ranks.tolist() == [rank for row in plain.ranks for rank in row]
    if isinstance(targets, TopKTargets | GivenIdsTargets):
        assert targets.tail_logprob.tolist() == plain.tail
        got = [row.tolist() for row in oracle.row_logprobs(targets)]
    else:
        got = targets.logprobs.tolist()
    assert len(got) == len(plain.logprobs)
    for mine, theirs in zip(got, plain.logprobs, strict=True):
        # A unit in the last place of float32, for the order in which the mass is added up. Near 0
        # it is the float64 of 1 - exp(tail) that is rounded, hence the absolute part.
        assert mine == pytest.approx(theirs, rel=2e-7, abs=1e-15)


@pytest.mark.parametrize("name", make.CASES)
def test_encode_writes_the_golden_bytes(name):
    targets, bits, table = make.CASES[name]
    assert encode(targets, bits=bits, id_table=table) == (make.FOLDER / name).read_bytes()


@pytest.mark.parametrize("name", make.CASES)
def test_decode_reads_the_golden_bytes(name):
    data = (make.FOLDER / name).read_bytes()
    targets, bits, table = make.CASES[name]
    given = given_of(targets)
    decoded = decode(data, id_tables=[make.id_table()], given_ids=given)
    assert decoded._tensors().keys() == targets._tensors().keys()
    check_round_trip(targets, bits, table)
    assert_agrees_with_the_plain_reader(data, table, given)


def test_every_golden_file_has_its_case():
    assert {path.name for path in make.FOLDER.glob("*.bin")} == {*make.CASES, make.ID_TABLE}
    assert all(f"_v{FORMAT_VERSION}.bin" in name for name in make.CASES)


def test_the_example_reads_as_its_page_says():
    data = (make.FOLDER / "top_k_v1.bin").read_bytes()
    plain = plain_reader.read(data)
    assert (len(data), plain.vocab_size, plain.value_bits) == (112, 11, 7)
    assert (plain.ids, plain.ranges, plain.codes) == ([[3, 9], [10]], [119, 0], [[1, 127], [127]])
    assert plain.realized == [-1420 / 2048, -65535 / 2048]
    assert (plain.entropy, plain.log_z) == ([1.25, 0.5], [10.5, -0.25])
    assert plain.logprobs[0] == pytest.approx([-1.38926772, -0.69166379], abs=1e-7)
    assert plain.logprobs[1] == pytest.approx([-0.13353139], abs=1e-7)


def test_the_example_of_draws_reads_as_its_page_says():
    data = (make.FOLDER / "sampled_v1.bin").read_bytes()
    plain = plain_reader.read(data)
    assert (len(data), plain.vocab_size, plain.num_draws) == (88, 1000, 8)
    assert (plain.ids, plain.counts) == ([[3, 700, 701], [9]], [[2, 5, 1], [8]])


def test_a_realized_logprob_of_0_is_read_as_minus_0():
    """FORMAT.md says so: readers that compare bytes have to know."""
    targets = random_targets(TopKSpec(3), 2, 11)
    targets = replace(targets, realized_logprob=torch.zeros(2))
    realized = decode(encode(targets)).realized_logprob
    assert realized is not None
    assert realized.view(torch.int32).tolist() == [-(2**31)] * 2


@pytest.mark.parametrize(
    ("vocab_size", "num_rows", "num_entries"),
    [(1000, 2, 4), (2**31 - 1, 2**32 - 1, 2**32 - 1), (7, 5, 35), (262_144, 3, 3), (8, 3, 6)],
)
def test_the_shift_of_the_identity_table_is_a_matter_of_whole_numbers(
    vocab_size: int, num_rows: int, num_entries: int
):
    shift = identity_shift(vocab_size, num_rows, num_entries)
    assert 2**shift * num_entries <= vocab_size * num_rows < 2 ** (shift + 1) * num_entries
    assert num_identity_buckets(vocab_size, shift) == (vocab_size - 1) // 2**shift + 1


FORMAT = Path(logit_codec.__file__).parent / "FORMAT.md"


@pytest.mark.parametrize(
    ("page", "heading", "name"),
    [
        pytest.param(FORMAT, "## Example of top_k", "top_k_v1.bin", id="top_k in FORMAT.md"),
        pytest.param(FORMAT, "## Example of sampled", "sampled_v1.bin", id="sampled in FORMAT.md"),
        pytest.param(
            *(FORMAT, "## Example of given_ids", "given_ids_v1.bin"), id="given_ids in FORMAT.md"
        ),
        pytest.param(
            *(FORMAT, "## Example of hidden", "hidden_int8_v1.bin"), id="hidden in FORMAT.md"
        ),
        pytest.param(
            make.FOLDER / "README.md", "## `top_k_v1.bin`", "top_k_v1.bin", id="golden/README.md"
        ),
    ],
)
def test_the_bytes_that_a_page_spells_out_are_those_of_the_example(page, heading, name):
    section = page.read_text().split(heading)[1].split("## ")[0]
    cells = [line.split("|")[1:3] for line in section.splitlines() if line.count("|") == 5]
    spelled = {int(offset): text.strip(" `") for offset, text in cells if offset.strip().isdigit()}
    spelled[40] = spelled[40].replace("sixteen `00", "00" * 16)
    joined = b""
    for offset in sorted(spelled):
        assert offset == len(joined)
        joined += bytes.fromhex(spelled[offset])
    assert joined == (make.FOLDER / name).read_bytes()


# Malformed bytes


def hostile_cases() -> dict[str, bytes]:
    cases = {name: (make.FOLDER / name).read_bytes() for name in make.CASES}
    bare = {"realized": False, "log_z": False}
    cases["no rows"] = encode(random_targets(TopKSpec(3), 3, 11)[:0])
    cases["no dense rows"] = encode(random_targets(DenseSpec(32), 3, 11)[:0])
    cases["no rows of features"] = encode(random_targets(FeaturesSpec((1, 2)), 3, 11)[:0])
    cases["no states"] = encode(random_targets(HiddenSpec(8), 3, 11)[:0])
    cases["no sampled rows"] = encode(random_targets(SampledSpec(3), 3, 11)[:0])
    cases["draws of fixed width"] = encode(random_targets(SampledSpec(5, **bare), 3, 4))
    cases["draws of a vocabulary of one"] = encode(random_targets(SampledSpec(9, **bare), 2, 1))
    cases["many draws"] = encode(random_targets(SampledSpec(300, **bare), 2, 400, scale=2.0))
    cases["three rows of three"] = encode(random_targets(TopKSpec(3, **bare), 3, 6), bits=5)
    cases["a vocabulary of one"] = encode(random_targets(TopKSpec(1, **bare), 2, 1), bits=8)
    return cases


def read_hostile(data: bytes | bytearray) -> Targets:
    return decode(data, id_tables=[make.id_table()], given_ids=make.given_ids())


HOSTILE = pytest.mark.parametrize(
    "data", [pytest.param(v, id=k) for k, v in hostile_cases().items()]
)


@HOSTILE
def test_decode_rejects_every_truncation(data):
    for length in range(len(data)):
        with pytest.raises(CodecError):
            read_hostile(data[:length])
        with pytest.raises(CodecError):
            read_hostile(with_digest(data[:length]) if length >= 16 else data[:length])
        with pytest.raises(CodecError):
            read_hostile(data[len(data) - length :] if length else b"")


@HOSTILE
def test_decode_rejects_anything_that_follows(data):
    for more in (b"\0", b"\0\0\0\0", bytes(16), data):
        with pytest.raises(CodecError):
            read_hostile(data + more)
        with pytest.raises(CodecError):
            read_hostile(with_digest(data + more))


@HOSTILE
def test_decode_rejects_every_flipped_bit(data):
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            read_hostile(changed)


@HOSTILE
def test_a_flipped_bit_under_a_fitting_digest_is_refused_or_read_as_the_format_says(data):
    """Never any other exception, and never a value that the second reader does not see."""
    table, given = make.id_table(), make.given_ids()
    for bit in range(8 * (len(data) - 16)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert_agrees_with_the_plain_reader(with_digest(changed), table, given)


def test_a_bfloat16_padding_of_minus_zero_is_refused():
    data = encode(random_targets(DenseSpec(16, realized=False, log_z=False), 1, 1))
    assert len(data) == OVERHEAD + 4
    with pytest.raises(CodecError, match="padding"):
        decode(with_digest(data[:58] + b"\0\x80" + data[60:]))


def test_max_entries_of_no_rows_is_one():
    data = encode(random_targets(TopKSpec(3), 3, 11)[:0])
    with pytest.raises(CodecError, match="max_entries must be 1 without rows, got 2"):
        decode(with_field(data, 20, "I", 2))


@given(data=st.data(), base=st.sampled_from(list(hostile_cases().values())))
@settings(deadline=None, max_examples=200)
def test_any_edits_under_a_fitting_digest_are_refused_or_read_as_the_format_says(data, base):
    changed = bytearray(base)
    edits = st.tuples(
        st.integers(0, len(base) - 17),
        st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255),
    )
    for offset, value in data.draw(st.lists(edits, min_size=1, max_size=8)):
        changed[offset] = value
    assert_agrees_with_the_plain_reader(with_digest(changed), make.id_table(), make.given_ids())


@given(
    data=st.data(),
    kind=st.sampled_from((1, 2)),
    flags=st.integers(0, 7),
    num_rows=st.integers(0, 4),
    vocab_size=st.integers(1, 20),
)
@settings(deadline=None, max_examples=200)
def test_random_planes_of_the_right_length_are_refused_or_read_as_the_format_says(
    data, kind, flags, num_rows, vocab_size
):
    bits = data.draw(st.sampled_from((16, 32) if kind == 1 else CODE_BITS))
    most = num_entries = 0
    sizes = [num_rows * vocab_size * bits]
    if kind == 2:
        most = data.draw(st.integers(1, vocab_size)) if num_rows else 1
        num_entries = data.draw(st.integers(num_rows, num_rows * most))
        width = max(1, (vocab_size - 1).bit_length())
        sizes = [num_rows * most.bit_length(), num_entries * width, num_rows * 16]
        sizes += [num_entries * bits, num_rows * 32]
    sizes += [num_rows * width for i, width in enumerate((16, 16, 32)) if flags >> i & 1]
    length = sum(-(-size // 32) * 4 for size in sizes)
    planes = data.draw(st.binary(min_size=length, max_size=length))
    header = struct.pack(
        "<4sBBBBIIIIQd16s", b"LSTG", 1, kind, kind - 1, bits, flags, num_rows, vocab_size, most,
        num_entries, data.draw(st.floats(0.1, 10.0)), bytes(16),
    )  # fmt: skip
    assert_agrees_with_the_plain_reader(with_digest(header + planes + bytes(16)))


@given(
    data=st.data(),
    kind=st.sampled_from((4, 5, 6, 7)),
    flags=st.integers(0, 15),
    num_rows=st.integers(0, 4),
    vocab_size=st.integers(1, 20),
)
@settings(deadline=None, max_examples=150)
def test_random_planes_of_a_new_kind_are_refused_or_read_as_the_format_says(
    data, kind, flags, num_rows, vocab_size
):
    bits = data.draw(st.sampled_from({4: (16, 32), 5: (32,), 6: (8, 16), 7: (16,)}[kind]))
    flags &= {4: 15, 5: 0}.get(kind, 7)
    most, num_entries, needed, given, ids = 0, 0, bytes(16), None, []
    if kind == 4:
        some_ids = st.sets(st.integers(0, vocab_size - 1), min_size=1)
        ids = data.draw(st.lists(some_ids, min_size=num_rows, max_size=num_rows))
        splits = [0, *itertools.accumulate(map(len, ids))]
        flat = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
        given = GivenIds.of((torch.tensor(splits), flat))
        most, num_entries, needed = max(map(len, ids), default=1), len(flat), given.digest()
        sizes = [num_entries * bits, num_rows * 32]
        sizes += [num_entries * max(1, (vocab_size - 1).bit_length())] if flags & 8 else []
    elif kind == 5:
        sizes = [num_rows * 32]
    else:
        most = data.draw(st.integers(1, 5))
        sizes = [num_rows * most * bits] + [num_rows * 16] * (bits == 8)
        if kind == 7:
            num_entries = data.draw(st.integers(1, 3))
            sizes = [num_entries * 32, num_rows * num_entries * most * bits]
    sizes += [num_rows * width for i, width in enumerate((16, 16, 32)) if flags >> i & 1]
    planes = b""
    for size in sizes:
        length = -(-size // 32) * 4
        zeros = st.just(bytes(length))  # so that some are read
        planes += data.draw(st.binary(min_size=length, max_size=length) | zeros)
    if kind == 4 and data.draw(st.booleans()):
        shares = [1 / (1 + len(row)) for row in ids]
        logprobs = [math.log(share) for share, row in zip(shares, ids, strict=True) for _ in row]
        codes = [round(-512 * value) for value in logprobs]
        values = plane(codes, 16) if bits == 16 else struct.pack(f"<{num_entries}f", *logprobs)
        tails = struct.pack(f"<{num_rows}f", *map(math.log, shares))
        planes = values + tails + planes[len(values + tails) :]
    header = struct.pack(
        "<4sBBBBIIIIQd16s", b"LSTG", 1, kind, 0, bits, flags, num_rows, vocab_size, most,
        num_entries, data.draw(st.floats(0.1, 10.0)), needed,
    )  # fmt: skip
    container = with_digest(header + planes + bytes(16))
    assert_agrees_with_the_plain_reader(container, given=given)


def plane(numbers: list[int], width: int) -> bytes:
    string = sum(number << (i * width) for i, number in enumerate(numbers))
    return string.to_bytes(-(-len(numbers) * width // 32) * 4, "little")


def codes_plane(counts: list[int], codes: list[int], draw, bits: int) -> bytes:
    """Any place of the best entry for each row, and `codes` for the others."""
    string = ""
    for count in counts:
        width = (count - 1).bit_length()
        place = draw(st.integers(0, count - 1))
        string += f"{place:0{width}b}"[::-1] if width else ""
    low_bits = bits - 3
    for level in range(1, 8):
        alive = [code for code in codes if code >> low_bits >= level - 1]
        string += "".join(str(int(code >> low_bits >= level)) for code in alive)
    string += "".join(f"{code & ((1 << low_bits) - 1):0{low_bits}b}"[::-1] for code in codes)
    return plane([int(bit) for bit in string], 1)


@given(
    data=st.data(),
    bits=st.sampled_from(CODE_BITS),
    vocab_size=st.integers(1, 40) | st.sampled_from((32003, 262_144, 2**31 - 1)),
    num_rows=st.integers(1, 5),
)
@settings(deadline=None, max_examples=80)
def test_any_codes_ranges_and_tails_read_as_the_formulas_say(data, bits, vocab_size, num_rows):
    """No writer has to have made them: a row with several best entries has its meaning too."""

    def draw(width: int, count: int) -> list[int]:
        number = st.integers(0, (1 << width) - 1) | st.just((1 << width) - 1)
        return data.draw(st.lists(number, min_size=count, max_size=count))

    some_ids = st.sets(st.integers(0, vocab_size - 1), min_size=1, max_size=6).map(sorted)
    ids = data.draw(st.lists(some_ids, min_size=num_rows, max_size=num_rows))
    counts = [len(row) for row in ids]
    num_entries = sum(counts)
    tails = st.floats(-100, 0, width=32, exclude_max=True) | st.sampled_from((-INF, -1e-30))
    tail = data.draw(st.lists(tails, min_size=num_rows, max_size=num_rows))
    header = struct.pack(
        "<4sBBBBIIIIQd16s", b"LSTG", 1, 2, 1, bits, 7, num_rows, vocab_size, max(counts),
        num_entries, 1.0, bytes(16),
    )  # fmt: skip
    planes = [
        plane(counts, max(counts).bit_length()),
        plane([i for row in ids for i in row], max(1, (vocab_size - 1).bit_length())),
        plane(draw(8, num_rows), 8),
        codes_plane(counts, draw(bits, num_entries - num_rows), data.draw, bits),
        struct.pack(f"<{num_rows}f", *tail),
        plane(draw(16, num_rows), 16),
        plane(draw(16, num_rows), 16),
        struct.pack(f"<{num_rows}f", *range(num_rows)),
    ]
    container = with_digest(b"".join([header, *planes, bytes(16)]))
    assert oracle.kept_ids(decode(container)) == ids
    assert_agrees_with_the_plain_reader(container)


@given(st.binary(max_size=200), st.booleans())
@settings(deadline=None, max_examples=200)
def test_random_bytes_are_refused(data, with_magic):
    data = b"LSTG\1" + data if with_magic else data
    with pytest.raises(CodecError):
        decode(data)
    with pytest.raises(CodecError):
        decode(with_digest(data + bytes(16)))


TOP_K = (make.FOLDER / "top_k_v1.bin").read_bytes()
ELIAS_FANO = (make.FOLDER / "top_k_elias_fano_v1.bin").read_bytes()
SAMPLED = (make.FOLDER / "sampled_v1.bin").read_bytes()
SAMPLED_TABLE = (make.FOLDER / "sampled_table_v1.bin").read_bytes()
DENSE = (make.FOLDER / "dense_f32_v1.bin").read_bytes()
GIVEN = (make.FOLDER / "given_ids_v1.bin").read_bytes()
GIVEN_F32 = (make.FOLDER / "given_ids_f32_v1.bin").read_bytes()
REALIZED = (make.FOLDER / "realized_v1.bin").read_bytes()
HIDDEN = (make.FOLDER / "hidden_int8_v1.bin").read_bytes()
HIDDEN_BF16 = (make.FOLDER / "hidden_bf16_v1.bin").read_bytes()
FEATURES = (make.FOLDER / "features_v1.bin").read_bytes()
NAN = math.nan


@pytest.mark.parametrize(
    ("data", "offset", "layout", "value", "message"),
    [
        (TOP_K, 0, "I", 0, "not a targets container"),
        (TOP_K, 4, "B", 0, "version 0 is not supported"),
        (TOP_K, 4, "B", 2, "version 2 is not supported.*reads version 1.*[Uu]pgrade"),
        (TOP_K, 5, "B", 0, "kind number 0"),
        (TOP_K, 5, "B", 8, "kind number 8"),
        (TOP_K, 6, "B", 0, "id coding 0"),
        (TOP_K, 6, "B", 2, "occupancy plane has 2 entries, not 3"),
        (TOP_K, 6, "B", 3, "id coding 3"),
        (DENSE, 6, "B", 1, "id coding 1"),
        (TOP_K, 7, "B", 9, "9 bits per value"),
        (TOP_K, 7, "B", 32, "32 bits per value"),
        (DENSE, 7, "B", 8, "8 bits per value"),
        (TOP_K, 8, "I", 15, "flags 0xf"),
        (TOP_K, 8, "I", 2**31 | 7, "flags 0x80000007"),
        (TOP_K, 8, "I", 6, "codes plane has 2 words, its content takes 6 bits"),
        (DENSE, 8, "I", 0, "has 120 bytes, its header implies 108"),
        (TOP_K, 12, "I", 3, "has 112 bytes, its header implies"),
        (TOP_K, 12, "I", 4, "num_entries 3 does not fit 4 rows"),
        (TOP_K, 16, "I", 0, "vocab_size must be 1 to 2"),
        (TOP_K, 16, "I", 2**31, "vocab_size must be 1 to 2"),
        (TOP_K, 16, "I", 10, "ids are not ascending ids of the vocabulary"),
        (TOP_K, 20, "I", 0, r"max_entries must be 1 to vocab_size \(11\), got 0"),
        (TOP_K, 20, "I", 12, r"max_entries must be 1 to vocab_size \(11\), got 12"),
        (TOP_K, 20, "I", 3, "no row has the header's largest"),
        (TOP_K, 24, "Q", 1, "num_entries 1 does not fit 2 rows"),
        (TOP_K, 24, "Q", 5, "num_entries 5 does not fit 2 rows"),
        (TOP_K, 24, "Q", 4, "counts of the rows do not add up"),
        (DENSE, 20, "I", 1, "zeros where others count entries"),
        (DENSE, 24, "Q", 1, "zeros where others count entries"),
        (TOP_K, 32, "d", 0.0, "temperature must be positive and finite, got 0.0"),
        (TOP_K, 32, "d", -1.0, "temperature must be positive and finite, got -1.0"),
        (TOP_K, 32, "d", INF, "temperature must be positive and finite, got inf"),
        (TOP_K, 32, "d", NAN, "temperature must be positive and finite, got nan"),
        (TOP_K, 40, "B", 1, "header names 0100.*, but id coding 1 of top_k takes none"),
        (TOP_K, 55, "B", 1, "header names .*01, but id coding 1 of top_k takes none"),
        (TOP_K, 56, "I", 0b1111, "do not add up"),
        (TOP_K, 56, "I", 0b0011, "do not add up"),
        (TOP_K, 56, "I", 0b10110, "padding of the counts plane"),
        (TOP_K, 60, "I", 0xA39, "row 0 cannot be a target: its ids are not ascending"),
        (TOP_K, 60, "I", 0xA33, "row 0 cannot be a target: its ids are not ascending"),
        (TOP_K, 60, "I", 0xB93, "row 1 cannot be a target: its ids are not ascending"),
        (TOP_K, 60, "I", 0x10A93, "padding of the ids plane"),
        (TOP_K, 64, "I", 0x10077, "padding of the ranges plane"),
        (TOP_K, 68, "I", 0x45, "padding of the codes plane"),
        (ELIAS_FANO, 68, "I", 0x03, "the best entry of a row is beyond its last"),
        (TOP_K, 72, "f", NAN, "row 0 cannot be a target: its logprobs are not finite"),
        (TOP_K, 72, "f", INF, "row 0 cannot be a target: its logprobs are not finite"),
        (TOP_K, 76, "f", 0.0, "row 1 cannot be a target: its logprobs are not finite"),
        (TOP_K, 76, "f", 1e-6, "row 1 cannot be a target: its logprobs are not finite"),
        (TOP_K, 88, "f", NAN, "row 0 cannot be a target: its log_z is not a finite"),
        (TOP_K, 92, "f", -INF, "row 1 cannot be a target: its log_z is not a finite"),
        (SAMPLED, 6, "B", 0, "id coding 0"),
        (SAMPLED, 7, "B", 7, "7 bits per value"),
        (SAMPLED, 8, "I", 7, "has 88 bytes, its header implies at least 92"),
        (SAMPLED, 16, "I", 701, "rank is not below the vocabulary's 701"),
        (SAMPLED, 20, "I", 0, "draws must be 1 to 65536, got 0"),
        (SAMPLED, 20, "I", 65537, "draws must be 1 to 65536, got 65537"),
        (SAMPLED, 20, "I", 7, "counts of a row add up to more than its 7 draws"),
        (SAMPLED, 24, "Q", 17, "num_entries 17 does not fit 2 rows of 1 to 8"),
        (SAMPLED, 24, "Q", 3, "occupancy plane has 4 entries, not 3"),
        (SAMPLED, 56, "I", 0b110011001, "occupancy plane has 5 entries, not 4"),
        (SAMPLED, 56, "I", 0b1000000011001, "beyond its last cell"),
        (SAMPLED, 56, "I", 0b100000011001, "beyond its last cell"),
        (SAMPLED, 56, "I", 0b10111, "a row has no entry"),
        (SAMPLED, 60, "I", 0x09BDBD03, "ranks of a row do not ascend"),
        (SAMPLED, 60, "I", 0x09BCBD03, "ranks of a row do not ascend"),
        (SAMPLED, 64, "I", 0x15B, "padding of the draws plane"),
        (SAMPLED, 64, "I", 0x59, "padding of the draws plane"),
        (SAMPLED, 64, "I", 0x7B, "counts of a row add up to more than its 8 draws"),
        (DENSE, 56, "f", NAN, "row 0 cannot be a target: its logprobs are not finite"),
        (DENSE, 68, "f", INF, "row 1 cannot be a target: its logprobs are not finite"),
        (DENSE, 68, "f", -INF, "row 1 cannot be a target: its probabilities do not add up"),
        (DENSE, 68, "f", 0.002, "row 1 cannot be a target: its probabilities do not add up"),
        (GIVEN, 6, "B", 1, "id coding 1"),
        (GIVEN, 7, "B", 8, "8 bits per value"),
        (GIVEN, 8, "I", 31, "flags 0x1f"),
        (GIVEN, 12, "I", 3, "header counts 3 rows, 3 ids and at most 2 in a row; the given ids"),
        (GIVEN, 16, "I", 10, "a given id is not below the vocabulary's 10"),
        (GIVEN, 20, "I", 3, "header counts 2 rows, 3 ids and at most 3 in a row"),
        (GIVEN, 24, "Q", 4, "header counts 2 rows, 4 ids"),
        (GIVEN, 40, "B", 1, "for other given ids .01"),
        (GIVEN, 56, "H", 0, "row 0 cannot be a target: its probabilities do not add up"),
        (GIVEN, 62, "H", 1, "padding of the values plane"),
        (GIVEN, 64, "f", NAN, "row 0 cannot be a target: its logprobs are not finite"),
        (GIVEN, 68, "f", 1e-6, "row 1 cannot be a target: its tail logprob is above 0"),
        (GIVEN, 68, "f", -INF, "row 1 cannot be a target: its probabilities do not add up"),
        (GIVEN, 72, "I", 0xB1, "row 0 cannot be a target: its ranks are not below"),
        (GIVEN, 72, "I", 0x1001, "padding of the ranks plane"),
        (GIVEN_F32, 56, "f", NAN, "row 0 cannot be a target: its logprobs are not finite"),
        (GIVEN_F32, 64, "f", INF, "row 1 cannot be a target: its logprobs are not finite"),
        (GIVEN_F32, 60, "f", -0.1, "row 0 cannot be a target: its probabilities do not add up"),
        (REALIZED, 7, "B", 16, "16 bits per value"),
        (REALIZED, 8, "I", 1, "flags 0x1"),
        (REALIZED, 20, "I", 1, "zeros where others count entries"),
        (REALIZED, 40, "B", 1, "header names 0100.*, but id coding 0 of realized takes none"),
        (REALIZED, 56, "f", NAN, "row 0 cannot be a target: its logprob is not a number of at"),
        (REALIZED, 60, "f", 0.01, "row 1 cannot be a target: its logprob is not a number of at"),
        (HIDDEN, 7, "B", 32, "32 bits per value"),
        (HIDDEN, 8, "I", 9, "flags 0x9"),
        (HIDDEN, 20, "I", 0, "states of 1 to 2.*got 0 and 0"),
        (HIDDEN, 20, "I", 2**31, "states of 1 to 2.*got 0 and 2147483648"),
        (HIDDEN, 24, "Q", 1, "a hidden container has 0 entries"),
        (HIDDEN, 62, "B", 1, "padding of the values plane"),
        (HIDDEN, 64, "H", 0x7FC0, "row 0 cannot be a target: its states are not finite"),
        (HIDDEN, 66, "H", 0xBF80, "row 1 cannot be a target: its scale is below 0"),
        (HIDDEN_BF16, 58, "H", 0x7F80, "row 0 cannot be a target: its states are not finite"),
        (FEATURES, 20, "I", 0, "states of 1 to 2"),
        (FEATURES, 24, "Q", 0, "1 to 64 layers"),
        (FEATURES, 24, "Q", 65, "1 to 64 layers"),
        (FEATURES, 40, "B", 1, "but id coding 0 of features takes none"),
        (FEATURES, 56, "I", 7, "ascending numbers from 0 to 1000000"),
        (FEATURES, 60, "I", 2**32 - 1, "ascending numbers from 0 to 1000000"),
        (FEATURES, 78, "H", 0x7FC0, "row 1 cannot be a target: its states are not finite"),
    ],
)
def test_what_a_reader_refuses_is_refused_by_name(data, offset, layout, value, message):
    with pytest.raises(CodecError, match=message):
        decode(with_field(data, offset, layout, value), given_ids=make.given_ids())


def test_given_ids_are_needed_to_read_them():
    with pytest.raises(CodecError, match=r"are needed to read them: decode\(data, given_ids="):
        decode(GIVEN)
    with pytest.raises(CodecError, match="for other given ids"):
        decode(GIVEN, given_ids=make.given_ids()[:1])


def test_an_unknown_id_table_is_named():
    digest = make.id_table().digest.hex()
    with pytest.raises(CodecError, match=f"the id table {digest} is needed"):
        decode(SAMPLED_TABLE)
    other = random_table(1000)
    with pytest.raises(CodecError, match=digest):
        decode(SAMPLED_TABLE, id_tables=[other])
    assert len(decode(SAMPLED_TABLE, id_tables=[other, make.id_table()])) == 2


def test_an_id_table_of_another_vocabulary_is_refused():
    with pytest.raises(CodecError, match="is for 1000 ids, the container has 999"):
        decode(with_field(SAMPLED_TABLE, 16, "I", 999), id_tables=[make.id_table()])
    with pytest.raises(ValueError, match="vocabulary of 1000 ids, the targets have 11"):
        encode(GOOD, id_table=make.id_table())


def test_draws_in_more_words_than_they_take_are_refused():
    longer = SAMPLED[:68] + bytes(4) + SAMPLED[68:]
    with pytest.raises(CodecError, match="draws plane has 2 words, its content takes 8 bits"):
        decode(with_digest(longer))


def test_a_container_of_no_whole_words_is_refused():
    with pytest.raises(CodecError, match="whole number of words"):
        decode(with_digest(SAMPLED[:-16] + b"\0" + bytes(16)))


@given(
    counts=st.lists(
        st.lists(st.integers(1, 9) | st.sampled_from((63, 64, 65, 5000)), min_size=1, max_size=12),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None, max_examples=150)
def test_any_counts_are_decoded(counts):
    num_draws = max(sum(row) for row in counts)
    counts = [[row[0] + num_draws - sum(row), *row[1:]] for row in counts]
    sizes = torch.tensor([len(row) for row in counts])
    targets = SampledTargets(
        vocab_size=100,
        temperature=1.0,
        row_splits=torch.nn.functional.pad(sizes.cumsum(0), (1, 0)),
        token_ids=torch.cat([torch.arange(len(row)) * 7 for row in counts]),
        counts=torch.tensor([count for row in counts for count in row]),
        num_draws=num_draws,
    )
    check_round_trip(targets, 7)
    assert_agrees_with_the_plain_reader(encode(targets))


def test_bytes_changed_on_the_way_are_told_from_malformed_ones():
    changed = bytearray(TOP_K)
    changed[60] ^= 1
    with pytest.raises(CodecError, match=r"digest does not match.*ask again"):
        decode(changed)


def test_a_codec_error_survives_a_pickle_with_its_row():
    error = pickle.loads(pickle.dumps(CodecError("row 3 is odd", 3)))
    assert (type(error), str(error), error.row) == (CodecError, "row 3 is odd", 3)
    assert isinstance(error, ValueError)


# What encode refuses

GOOD = make.CASES["top_k_v1.bin"][0]
GOOD_DENSE = make.CASES["dense_f32_v1.bin"][0]
GOOD_SAMPLED = make.CASES["sampled_v1.bin"][0]
GOOD_GIVEN = make.CASES["given_ids_v1.bin"][0]
GOOD_REALIZED = make.CASES["realized_v1.bin"][0]
GOOD_HIDDEN = make.CASES["hidden_int8_v1.bin"][0]
GOOD_BF16 = make.CASES["hidden_bf16_v1.bin"][0]
GOOD_FEATURES = make.CASES["features_v1.bin"][0]


@pytest.mark.parametrize(
    ("targets", "changed", "row", "why"),
    [
        (GOOD, {"token_ids": torch.tensor([9, 3, 10])}, 0, "ascending ids"),
        (GOOD, {"token_ids": torch.tensor([3, 3, 10])}, 0, "ascending ids"),
        (GOOD, {"token_ids": torch.tensor([3, 9, 11])}, 1, "ascending ids"),
        (GOOD, {"token_ids": torch.tensor([-1, 9, 10])}, 0, "ascending ids"),
        (GOOD, {"logprobs": torch.tensor([-1.3862944, NAN, -0.1335])}, 0, "not finite"),
        (GOOD, {"logprobs": torch.tensor([-1.3862944, -0.6931472, -INF])}, 1, "not finite"),
        (GOOD, {"logprobs": torch.tensor([-1.3862944, -0.6931472, -0.14])}, 1, "do not add up"),
        (GOOD, {"tail_logprob": torch.tensor([-1.3862944, NAN])}, 1, "not finite"),
        (GOOD, {"tail_logprob": torch.tensor([-1.3862944, INF])}, 1, "tail logprob is not below 0"),
        (GOOD, {"tail_logprob": torch.tensor([-1.3862944, 0.0])}, 1, "tail logprob is not below 0"),
        (GOOD, {"tail_logprob": torch.tensor([1e-6, -2.0794415])}, 0, "tail logprob is not below"),
        (GOOD, {"tail_logprob": torch.tensor([-1.3862944, -INF])}, 1, "do not add up"),
        (GOOD, {"row_splits": torch.tensor([0, 3, 3])}, 1, "no entry"),
        (GOOD, {"log_z": torch.tensor([NAN, 0.0])}, 0, "log_z is not a finite"),
        (GOOD, {"log_z": torch.tensor([0.0, INF])}, 1, "log_z is not a finite"),
        (GOOD, {"entropy": torch.tensor([INF, 0.0])}, 0, "entropy is not a finite"),
        (GOOD, {"entropy": torch.tensor([0.0, NAN])}, 1, "entropy is not a finite"),
        (GOOD, {"realized_logprob": torch.tensor([0.0, NAN])}, 1, "realized_logprob is not"),
        (GOOD_SAMPLED, {"counts": torch.tensor([2, 5, 2, 8])}, 0, "do not add up to the 8 draws"),
        (GOOD_SAMPLED, {"counts": torch.tensor([3, 5, 0, 8])}, 0, "not all at least 1"),
        (GOOD_SAMPLED, {"counts": torch.tensor([2, 5, 1, 7])}, 1, "do not add up to the 8 draws"),
        (GOOD_SAMPLED, {"num_draws": 9}, 0, "do not add up to the 9 draws"),
        (GOOD_SAMPLED, {"token_ids": torch.tensor([3, 701, 700, 9])}, 0, "ascending ids"),
        (GOOD_SAMPLED, {"token_ids": torch.tensor([3, 700, 701, 1000])}, 1, "ascending ids"),
        (GOOD_SAMPLED, {"row_splits": torch.tensor([0, 4, 4])}, 1, "no entry"),
        (GOOD_GIVEN, {"token_ids": torch.tensor([9, 3, 10])}, 0, "ascending ids"),
        (GOOD_GIVEN, {"row_splits": torch.tensor([0, 3, 3])}, 1, "no entry"),
        (GOOD_GIVEN, {"logprobs": torch.tensor([-1.3862944, NAN, -0.1335])}, 0, "not finite"),
        (GOOD_GIVEN, {"logprobs": torch.tensor([-1.3862944, -0.6931472, INF])}, 1, "not finite"),
        (GOOD_GIVEN, {"tail_logprob": torch.tensor([-1.3862944, NAN])}, 1, "not finite"),
        (GOOD_GIVEN, {"tail_logprob": torch.tensor([-1.3862944, 1e-6])}, 1, "above 0"),
        (GOOD_GIVEN, {"ranks": torch.tensor([0, 1, 11]).int()}, 1, "ranks are not below"),
        (GOOD_GIVEN, {"ranks": torch.tensor([-1, 1, 0]).int()}, 0, "ranks are not below"),
        (GOOD_REALIZED, {"realized_logprob": torch.tensor([-1.0, NAN])}, 1, "number of at most 0"),
        (GOOD_REALIZED, {"realized_logprob": torch.tensor([-1.0, 0.1])}, 1, "number of at most 0"),
        (GOOD_HIDDEN, {"scale": torch.tensor([1.0, INF])}, 1, "states are not finite"),
        (GOOD_HIDDEN, {"scale": torch.tensor([-1.0, 1.0])}, 0, "scale is below 0"),
        (GOOD_HIDDEN, {"realized_logprob": torch.tensor([-1.0, NAN])}, 1, "realized_logprob is"),
        (GOOD_BF16, {"values": torch.tensor([[NAN, 0, 0]]).bfloat16()}, 0, "states are not finite"),
        (GOOD_FEATURES, {"hidden": GOOD_FEATURES.hidden.log()}, 0, "states are not finite"),
        (GOOD_DENSE, {"logprobs": torch.full((3, 3), -1.0)}, 0, "do not add up"),
        (GOOD_DENSE, {"logprobs": torch.full((3, 3), -INF)}, 0, "do not add up|not finite"),
        (GOOD_DENSE, {"logprobs": torch.full((3, 3), NAN)}, 0, "not finite"),
        (GOOD_DENSE, {"log_z": torch.tensor([0.0, 0.0, NAN])}, 2, "log_z is not a finite"),
    ],
)
def test_encode_refuses_what_decode_would_and_names_the_row(targets, changed, row, why):
    with pytest.raises(CodecError, match=f"row {row} cannot be a target: .*{why}") as raised:
        encode(replace(targets, **changed))
    assert raised.value.row == row


@pytest.mark.parametrize("bits", [0, 4, 9, 32])
def test_encode_refuses_a_width_that_the_format_does_not_have(bits):
    with pytest.raises(ValueError, match=f"one of .5, 6, 7, 8, 16. for top_k, got {bits}"):
        encode(GOOD, bits=bits)
    with pytest.raises(ValueError, match=r"one of .16, 32. for given_ids, got 7"):
        encode(GOOD_GIVEN, bits=7)


@pytest.mark.parametrize(("row_splits", "got"), [([1, 2], "1 to 2"), ([0, 2], "0 to 2")])
def test_encode_refuses_row_splits_that_do_not_span_the_entries(row_splits, got):
    targets = TopKTargets(
        vocab_size=11,
        temperature=1.0,
        row_splits=torch.tensor(row_splits),
        token_ids=torch.tensor([3]),
        logprobs=torch.tensor([0.5]).log(),
        tail_logprob=torch.tensor([0.5]).log(),
    )
    encode(replace(targets, row_splits=torch.tensor([0, 1])))
    with pytest.raises(CodecError, match=f"row_splits must go from 0 to the 1 entries, got {got}$"):
        encode(targets)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        pytest.param(
            {"temperature": INF}, "must be positive and finite, got 11 and inf", id="temperature"
        ),
        pytest.param(
            {"vocab_size": 2**31},
            "must be positive and finite, got 2147483648 and 1.0",
            id="vocab_size",
        ),
        pytest.param(
            {
                "logprobs": torch.tensor([-9.0, -9.0, -9.0]),
                "tail_logprob": torch.tensor([0.0, 0.0]),
            },
            "row 0 cannot be a target: its tail logprob is not below 0",
            id="a tail of 0",
        ),
    ],
)
def test_encode_writes_nothing_that_decode_refuses(changed, why):
    with pytest.raises(ValueError, match=why):
        encode(replace(GOOD, **changed))


# Parts


@pytest.mark.parametrize(
    "text",
    [
        "top_k:5",
        "top_k:5,bits=16,realized=0,entropy=1",
        "top_k:min_p=1/16,max_k=40,bits=5",
        "sampled:20,entropy=1",
        "dense:f32",
        "dense:bf16,realized=0,log_z=0",
        "given_ids:ranks=1,entropy=1",
        "given_ids:bits=32,realized=0",
        "realized",
        "hidden:int8",
        "hidden:bf16,realized=0",
        "features:layers=1+4+9",
    ],
)
@pytest.mark.parametrize("max_nbytes", [1, 200, 1000, 10**6])
def test_parts_join_to_the_same_targets(text, max_nbytes):
    spec = completed(parse_targets(text))
    targets = random_targets(spec, 43, 37)
    bits, given = getattr(spec, "bits", 7), given_of(targets)
    whole = decode(encode(targets, bits=bits), given_ids=given)
    parts = list(encode_parts(targets, spec, max_nbytes=max_nbytes))
    edges = [first for first, _, _ in parts] + [43]
    assert edges[0] == 0
    assert [count for _, count, _ in parts] == [b - a for a, b in itertools.pairwise(edges)]
    for first, count, data in parts:
        assert data == encode(targets[first : first + count], bits=bits)
    joined = decode_parts([data for _, _, data in parts], given_ids=given)
    assert joined._tensors().keys() == whole._tensors().keys()
    for name, value in whole._tensors().items():
        assert same_bits(getattr(joined, name), value), name
    if max_nbytes == 10**6:
        assert len(parts) == 1
    if max_nbytes == 1:
        assert len(parts) == 43


@pytest.mark.parametrize(
    "text",
    [
        "top_k:1,bits=5,realized=0,log_z=0",
        "top_k:5",
        "top_k:37,bits=16,entropy=1",
        "top_k:min_p=1e-9,max_k=40,bits=5",
        "sampled:1,realized=0",
        "sampled:20",
        "sampled:2000,entropy=1",
        "dense:f32",
        "dense:bf16,realized=0,log_z=0",
        "dense:bf16,entropy=1",
        "given_ids:ranks=1,entropy=1",
        "given_ids:bits=32,realized=0",
        "realized",
        "hidden:int8",
        "hidden:bf16,realized=0",
        "features:layers=1+4+9",
    ],
)
def test_a_part_is_never_larger_than_asked_unless_it_is_one_row(text):
    spec = completed(parse_targets(text))
    targets = random_targets(spec, 300, 37, scale=0.1)
    for max_nbytes in (1000, 5000, 20_000):
        for _, count, data in encode_parts(targets, spec, max_nbytes=max_nbytes):
            assert count == 1 or len(data) <= max_nbytes


@pytest.mark.parametrize(
    "text",
    [
        "top_k:1,bits=5,realized=0,log_z=0",
        "top_k:5,entropy=1",
        "top_k:min_p=1e-9,max_k=40,bits=5",
        "sampled:1,realized=0",
        "sampled:20",
        "sampled:2000,entropy=1",
        "dense:f32",
        "dense:bf16,entropy=1",
        "given_ids:ranks=1,entropy=1",
        "given_ids:bits=32,realized=0",
        "realized",
        "hidden:int8",
        "hidden:bf16,realized=0",
        "features:layers=1+4+9",
    ],
)
def test_max_row_nbytes_is_an_upper_bound_of_what_a_row_takes(text):
    """With 32 rows every plane fills its words, so there is no padding to count."""
    spec = completed(parse_targets(text))
    for scale in (0.1, 4.0):
        targets = random_targets(spec, 32, 37, scale=scale)
        for table in (None, random_table(37)):
            data = encode(targets, bits=getattr(spec, "bits", 7), id_table=table)
            # The string of draws may end in the middle of its last word.
            assert (len(data) - OVERHEAD - 4) / 32 <= spec.max_row_nbytes(37)


def test_where_a_sequence_is_split_does_not_depend_on_its_values():
    spec = TopKSpec(40, min_p=1 / 64)
    flat, peaked = (random_targets(spec, 43, 50, scale=scale) for scale in (0.1, 9.0))
    edges = [
        [(first, count) for first, count, _ in encode_parts(targets, spec, max_nbytes=400)]
        for targets in (flat, peaked)
    ]
    assert edges[0] == edges[1]
    assert len(edges[0]) > 1


def parts_with_a_bad_row(row: int) -> CodecError:
    spec = TopKSpec(5)
    targets = random_targets(spec, 43, 37)
    log_z = targets.log_z.clone()
    log_z[row] = NAN
    with pytest.raises(CodecError) as raised:
        list(encode_parts(replace(targets, log_z=log_z), spec, max_nbytes=200))
    return raised.value


@pytest.mark.parametrize("row", [0, 13, 42])
def test_the_row_of_an_error_counts_from_the_first_row_of_all_parts(row):
    assert parts_with_a_bad_row(row).row == row


def test_the_text_of_an_error_names_the_same_row():
    assert str(parts_with_a_bad_row(13)).startswith("row 13 ")


def test_the_parts_before_a_bad_row_are_handed_out():
    targets = replace(GOOD, log_z=torch.tensor([0.0, NAN]))
    parts = encode_parts(targets, TopKSpec(2, entropy=True), max_nbytes=1)
    assert next(parts)[:2] == (0, 1)
    with pytest.raises(CodecError, match="log_z"):
        next(parts)


# Memory


def run_python(code: str, stdin: str = "") -> str:
    """In a process of its own, one thread, with an allocator that hands blocks back at once."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        input=stdin,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PROC = """
import sys

def proc(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
"""

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS")

HUGE_COUNTS = """
import resource
import torch
from logit_codec import CodecError, decode

payloads = [bytes.fromhex(line) for line in sys.stdin.read().split()]
decode(payloads.pop(0))
for _ in range(2):  # once without a limit, so that what is loaded or grown lazily is there
    for payload in payloads:
        try:
            decode(payload)
        except CodecError:
            continue
        raise SystemExit("not refused: " + payload.hex())
    limit = proc("VmSize") + (1 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(1 << 20)  # the limit holds for tensors
except RuntimeError:
    print("refused", len(payloads))
"""


@needs_proc
def test_huge_stated_counts_are_refused_without_allocating_for_them():
    """decode runs with 1 MiB of address space to spare, which is enough to say no."""
    payloads = []
    for base in hostile_cases().values():
        for value in (2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1):
            # States and single logprobs do not depend on the vocabulary.
            offsets = (12, 20) if base[5] >= 5 else (12, 16, 20)
            payloads += [with_field(base, offset, "I", value) for offset in offsets]
            payloads.append(with_field(base, 24, "Q", value * value))
            everything = with_field(with_field(base, 12, "I", value), 16, "I", 2**31 - 1)
            if base[5] == 2:
                everything = with_field(everything, 20, "I", 2**31 - 1)
                everything = with_field(everything, 24, "Q", value)
            payloads.append(everything)
    # Where there are no rows a large vocabulary is no lie.
    payloads = [TOP_K, *(data for data in payloads if data[12:16] != bytes(4))]
    lines = "\n".join(data.hex() for data in payloads)
    assert run_python(PROC + HUGE_COUNTS, lines) == f"refused {len(payloads) - 1}\n"


DECODE_MEMORY = """
import gc
import torch
from logit_codec import DenseTargets, FeaturesTargets, GivenIdsTargets, HiddenTargets
from logit_codec import RealizedTargets, SampledTargets, TopKTargets, decode, encode

for line in sys.stdin.read().split():
    kind, bits, vocab_size, per_row, num_rows = line.split(",")
    bits, vocab_size, per_row, num_rows = int(bits), int(vocab_size), int(per_row), int(num_rows)

    def container(num_rows):
        fill = -float(torch.tensor(float(per_row)).log())
        if kind == "realized":
            logprobs = torch.full((num_rows,), -1.0)
            return encode(
                RealizedTargets(vocab_size=9, temperature=1.0, realized_logprob=logprobs)
            ), None
        if kind == "hidden":
            values = torch.zeros(num_rows, per_row, dtype=torch.int8)
            scale = torch.ones(num_rows)
            more = dict(values=values, scale=scale, head_fingerprint="ab" * 16)
            return encode(HiddenTargets(vocab_size=9, temperature=1.0, **more)), None
        if kind == "features":
            states = torch.zeros(num_rows, 1, per_row, dtype=torch.bfloat16)
            return encode(
                FeaturesTargets(vocab_size=9, temperature=1.0, hidden=states, layers=(1,))
            ), None
        if kind == "dense":
            logprobs = torch.full((num_rows, vocab_size), fill)
            logprobs = logprobs.to(torch.float32 if bits == 32 else torch.bfloat16)
            return encode(
                DenseTargets(vocab_size=vocab_size, temperature=1.0, logprobs=logprobs)
            ), None
        common = dict(
            vocab_size=vocab_size,
            temperature=1.0,
            row_splits=torch.arange(num_rows + 1) * per_row,
            token_ids=torch.arange(per_row).repeat(num_rows),
        )
        if kind == "sampled":
            counts = torch.ones(per_row * num_rows, dtype=torch.int64)
            return encode(SampledTargets(counts=counts, num_draws=per_row, **common)), None
        Kind = GivenIdsTargets if kind == "given_ids" else TopKTargets
        targets = Kind(
            **common,
            logprobs=torch.full((per_row * num_rows,), fill),
            tail_logprob=torch.full((num_rows,), -float("inf")),
        )
        return encode(targets, bits=bits), getattr(targets, "given", None)

    data, given = container(10)
    decode(data, given_ids=given)
    data, given = container(num_rows)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = proc("VmRSS")
    decode(data, given_ids=given)
    assert len(data) > 700_000, len(data)
    print(line, (proc("VmHWM") - before) / len(data))
"""

DECODED = {
    "the default spec": "top_k,7,32003,64,8000",
    "the smallest ids and codes of one entry per row": "top_k,5,1,1,200000",
    "wide codes": "top_k,16,262144,128,2500",
    "draws from a real vocabulary": "sampled,0,262144,64,8000",
    "one draw per row": "sampled,0,262144,1,350000",
    "one draw from one id": "sampled,0,1,1,800000",
    "one given id per row": "given_ids,16,32003,1,150000",
    "int8 states": "hidden,8,9,64,20000",
}
"""The worst case, and what is usual."""
MORE_DECODED = {
    "few rows of many entries": "top_k,5,32003,8000,160",
    "dense in f32": "dense,32,1000,1000,300",
    "dense in bf16": "dense,16,1000,1000,600",
    "dense in bf16 of one id": "dense,16,1,1,600000",
    "every id of a vocabulary of 32 in 5 bits": "top_k,5,32,32,25000",
    "every id of a vocabulary of 16 in 5 bits": "top_k,5,16,16,50000",
    "draws from 4,096 ids": "sampled,0,4096,16,45000",
    "one draw from 4,096 ids": "sampled,0,4096,1,450000",
    "every id of a vocabulary of 32 drawn": "sampled,0,32,32,25000",
    "given ids": "given_ids,16,32003,64,8000",
    "single logprobs": "realized,32,9,1,250000",
    "states of one number": "hidden,8,9,1,200000",
    "features": "features,16,9,64,8000",
}


def measure_decode(cases: dict[str, str]) -> dict[str, float]:
    """Case -> the most memory that decode held, in multiples of the container's size."""
    lines = run_python(PROC + DECODE_MEMORY, "\n".join(cases.values())).splitlines()
    measured = dict(line.split() for line in lines)
    return {name: float(measured[line]) for name, line in cases.items()}


@pytest.fixture(scope="module")
def decode_memory() -> dict[str, float]:
    return measure_decode(DECODED)


@needs_proc
@pytest.mark.parametrize("name", DECODED)
def test_decode_needs_at_most_72_times_the_container(decode_memory, name):
    assert decode_memory[name] <= 72


@needs_proc
@pytest.mark.slow
def test_decode_needs_at_most_72_times_any_container():
    for name, multiple in measure_decode(MORE_DECODED).items():
        assert multiple <= 72, name


@needs_proc
def test_decode_needs_at_most_40_times_a_container_of_the_usual_kinds(decode_memory):
    """Large vocabularies with entries of 10 bits or more, that is."""
    usual = ("the default spec", "wide codes", "draws from a real vocabulary", "one draw per row")
    for name in usual:
        assert decode_memory[name] <= 40, name


REFUSED_MEMORY = """
import gc
import torch
import xxhash
from logit_codec import CodecError, IdTable, decode
from logit_codec.header import ELIAS_FANO_IDS, Header
from logit_codec.kinds import kind_named

def measure(name, content, id_tables, **fields):
    header = Header(
        kind=kind_named("sampled").number, id_coding=ELIAS_FANO_IDS, value_bits=0, flags=0, temperature=1.0, **fields
    )
    body = header.pack() + content
    data = body + xxhash.xxh3_128_digest(body)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = proc("VmRSS")
    try:
        decode(data, id_tables=id_tables)
    except CodecError as error:
        print((proc("VmHWM") - before) / len(data), name, error, sep=": ")

table = IdTable(
    vocab_size=1024, shifts=torch.zeros(1024, dtype=torch.int64), ids=torch.arange(1024)
)
table.digest, table.starts
every_id = dict(num_rows=64, vocab_size=65536, max_entries=65536, num_entries=64 * 65536)
measure("warm-up", bytes(64), (), num_rows=1, vocab_size=9, max_entries=9, num_entries=8)
measure("no draws", b"\\x55" * (1 << 20), (), **every_id)
measure(
    "ones in every cell",
    b"\\xff" * (1025 << 10),
    (table,),
    num_rows=8192,
    vocab_size=1024,
    max_entries=8,
    num_entries=8192,
    needed=table.digest,
)
"""


@needs_proc
def test_to_refuse_a_container_needs_at_most_72_times_its_size():
    lines = run_python(PROC + REFUSED_MEMORY).splitlines()
    measured = {name: float(most) for most, name, _ in (line.split(": ", 2) for line in lines)}
    assert list(measured) == ["warm-up", "no draws", "ones in every cell"]
    assert measured["no draws"] <= 72
    assert measured["ones in every cell"] <= 72


# Imports


def test_the_package_imports_torch_numpy_xxhash_and_the_standard_library_only():
    allowed = {"torch", "numpy", "xxhash", "logit_codec", *sys.stdlib_module_names}
    for path in Path(logit_codec.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_importing_the_package_loads_neither_transformers_nor_grpc_nor_ray():
    loaded = set(run_python("import sys, logit_codec; print(*sys.modules)").split())
    assert {"torch", "xxhash", "logit_codec.wire"} <= loaded
    heavy = {"transformers", "tokenizers", "grpc", "google.protobuf", "ray", "pydantic"}
    assert loaded.isdisjoint(heavy)
    assert loaded.isdisjoint({"protos", "teacher_server", "student_trainer"})
