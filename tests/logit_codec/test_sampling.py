"""Systematic counts against a float64 oracle, that they are unbiased, and where u comes from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logit_codec import (
    CodecError,
    SampledSpec,
    SampledTargets,
    encode,
    select,
    uniforms,
)
from tests.support import codec_oracle as oracle

VOCABULARIES = (1, 2, 3, 17, 255, 256, 257, 511, 1000, 5003)


def stratified(num_rows: int) -> Tensor:
    """(R,) one u from each of R equal parts of [0, 1)."""
    return (torch.arange(num_rows, dtype=torch.float64) + 0.37) / num_rows


def sample(logits: Tensor, n: int, u: Tensor, **options) -> SampledTargets:
    targets = select(logits, SampledSpec(n, realized=False), uniforms=u, **options)
    assert isinstance(targets, SampledTargets)
    return targets


def count_matrix(targets: SampledTargets) -> Tensor:
    """(R, V) float64 counts."""
    return targets.to_dense().double() * targets.num_draws


def oracle_counts(logits: Tensor, n: int, u: Tensor, temperature: float = 1.0) -> Tensor:
    """(R, V) float64: how many (i + u) / n fall into each id's part of the running sum."""
    ends = oracle.logprobs(logits, temperature).exp().cumsum(1)
    ends = ends / ends[:, -1:]
    below = ((ends * n) - u[:, None]).ceil().clamp(min=0, max=n)  # draws that end before
    below[:, -1] = n
    return below.diff(dim=1, prepend=torch.zeros(len(logits), 1, dtype=torch.float64))


def check_is_a_sample(targets: SampledTargets, logits: Tensor, temperature: float = 1.0) -> None:
    """What holds for any u: sums, order, and counts within 1 of their expectation."""
    n = targets.num_draws
    counts = count_matrix(targets)
    assert torch.equal(counts.sum(1).round(), torch.full((len(logits),), float(n)).double())
    assert bool((targets.counts >= 1).all())
    for ids in oracle.kept_ids(targets):
        assert ids == sorted(set(ids))
    expected = n * oracle.logprobs(logits, temperature).exp()
    assert float((counts - expected).abs().max()) <= 1 + n * 1e-5
    assert float(counts[expected == 0].sum()) == 0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_the_counts_are_those_of_the_oracle(vocab_size, temperature):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 5.0, 30.0):
        logits = torch.randn(40, vocab_size, generator=generator) * scale
        u = torch.rand(40, generator=generator, dtype=torch.float64)
        for n in (1, 16, 64, 300):
            targets = sample(logits, n, u, temperature=temperature)
            check_is_a_sample(targets, logits, temperature)
            moved = (count_matrix(targets) - oracle_counts(logits, n, u, temperature)).abs().sum()
            # A draw may fall on the other side of an edge that float32 moved by 1e-6.
            assert float(moved) <= 4


def test_the_counts_of_a_large_vocabulary_are_those_of_the_oracle():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 262_144, generator=generator) * 4
    logits[0] = 0.0
    logits[1, 200_000] = 60.0
    u = torch.rand(6, generator=generator, dtype=torch.float64)
    targets = sample(logits, 64, u)
    check_is_a_sample(targets, logits)
    assert float((count_matrix(targets) - oracle_counts(logits, 64, u)).abs().sum()) <= 4


@given(
    num_rows=st.integers(1, 9),
    vocab_size=st.integers(1, 600),
    n=st.sampled_from((1, 2, 7, 64, 1000)),
    kind=st.sampled_from(("random", "peaked", "flat", "tied", "masked", "one left")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=150)
def test_any_row_is_sampled_soundly(num_rows, vocab_size, n, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 4
    if kind == "peaked":  # all but one id underflow
        logits[:, int(seed % vocab_size)] += 500.0
    elif kind == "flat":
        logits.zero_()
    elif kind == "tied":
        logits = logits.sign()
    elif kind == "masked":
        logits[torch.rand(num_rows, vocab_size, generator=generator) < 0.5] = -math.inf
        logits[:, 0] = 1.0
    elif kind == "one left":
        logits[:, 1:] = -math.inf
    logits = logits.to(dtype)
    u = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    before = logits.clone()
    targets = sample(logits, n, u)
    assert torch.equal(logits, before)
    check_is_a_sample(targets, logits)
    if kind in ("peaked", "one left"):
        assert targets.counts.tolist() == [n] * num_rows
    encode(targets)


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_the_ends_of_the_range_of_u_are_sampled_soundly(u):
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, -3:] = -math.inf
    logits[:, :3] = -math.inf
    for n in (1, 3, 64, 65_536):
        check_is_a_sample(sample(logits, n, torch.full((5,), u, dtype=torch.float64)), logits)


def test_a_row_of_one_id_of_probability_one_is_that_id_for_every_u():
    logits = torch.full((100, 1000), -math.inf)
    logits[:, 999] = -7.0
    targets = sample(logits, 64, stratified(100))
    assert targets.token_ids.tolist() == [999] * 100
    assert targets.counts.tolist() == [64] * 100


def test_the_mean_over_all_u_is_the_distribution():
    """Exactly unbiased: over R strata of u the mean is off by 1 / (R * N) at most, not 1 / sqrt(R)."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 3
    expected = oracle.logprobs(logits).exp()[0]
    for num_draws in (1, 16, 64):
        for rows in (64, 4096):
            counts = count_matrix(sample(logits.expand(rows, -1), num_draws, stratified(rows)))
            error = (counts.mean(0) / num_draws - expected).abs().max()
            assert float(error) <= 1.01 / (rows * num_draws) + 1e-6


def test_the_error_of_the_mean_falls_with_the_root_of_the_draws():
    """With hashed u, as the service draws: the error of the mean of R samples is that of one / sqrt(R)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 400, generator=generator) * 2.5
    expected = oracle.logprobs(logits).exp()
    repeats = 64

    def mean_error(samples: int) -> float:
        """Root mean square over repeats and rows of the error of the mean of so many samples."""
        total = 0.0
        for row in range(len(logits)):
            u = uniforms(samples, row, bytes(16), torch.arange(repeats * samples))
            rows = logits[row].expand(repeats * samples, -1)
            dense = sample(rows, 16, u).to_dense().double().view(repeats, samples, -1)
            total += float((dense.mean(1) - expected[row]).square().sum(1).mean())
        return math.sqrt(total / len(logits))

    one = mean_error(1)
    for samples in (16, 256):
        assert mean_error(samples) * math.sqrt(samples) / one == pytest.approx(1.0, abs=0.1)


def test_a_row_gets_the_same_draws_alone_and_among_others():
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (3, 300, 2000, 70_001):
        logits = torch.randn(33, vocab_size, generator=generator) * 4
        u = torch.rand(33, generator=generator, dtype=torch.float64)
        spec = SampledSpec(64, entropy=True, log_z=True)
        realized = torch.zeros(33, dtype=torch.int64)
        together = select(logits, spec, uniforms=u, realized_ids=realized)
        for row in (0, 7, 32):
            one = slice(row, row + 1)
            alone = select(logits[one], spec, uniforms=u[one], realized_ids=realized[one])
            assert encode(alone) == encode(together[one])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_refused_and_spoils_no_other(bad):
    logits = torch.randn(5, 600, generator=torch.Generator().manual_seed(0))
    u = stratified(5)
    sound = sample(logits, 16, u)
    for row in (0, 2, 4):
        spoiled = logits.clone()
        spoiled[row, 300] = bad
        targets = sample(spoiled, 16, u)
        with pytest.raises(CodecError, match=f"row {row} cannot be a target") as raised:
            encode(targets)
        assert raised.value.row == row
        for other in {0, 1, 2, 3, 4} - {row}:
            one = slice(other, other + 1)
            assert encode(targets[one]) == encode(sound[one])


def test_a_row_of_nothing_but_minus_infinity_is_refused():
    logits = torch.zeros(3, 10)
    logits[1] = -math.inf
    with pytest.raises(CodecError, match="row 1 cannot be a target: it has no entry"):
        encode(sample(logits, 4, stratified(3)))


def test_what_a_row_carries_beside_its_draws_is_that_of_the_oracle():
    logits = torch.randn(20, 1001, generator=torch.Generator().manual_seed(0)) * 4
    realized = torch.arange(20) * 50
    spec = SampledSpec(16, entropy=True, log_z=True)
    targets = select(logits, spec, temperature=1.5, uniforms=stratified(20), realized_ids=realized)
    expected = oracle.logprobs(logits, 1.5).gather(1, realized[:, None])[:, 0]
    for value, wanted in (
        (targets.realized_logprob, expected),
        (targets.entropy, oracle.entropy(logits, 1.5)),
        (targets.log_z, oracle.log_z(logits, 1.5)),
    ):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=4e-6)


def test_no_rows_have_no_draws():
    targets = sample(torch.zeros(0, 9), 4, stratified(0))
    assert (len(targets), targets.num_draws, targets.vocab_size) == (0, 4, 9)


@pytest.mark.parametrize(
    ("given_uniforms", "got"),
    [
        (None, "got none"),
        (torch.zeros(3), r"torch.float32 of shape \(3,\)"),
        (torch.zeros(2, dtype=torch.float64), r"of shape \(2,\)"),
        (torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), "values outside"),
        (torch.tensor([0.0, -0.1, 0.0], dtype=torch.float64), "values outside"),
        (torch.tensor([0.0, math.nan, 0.0], dtype=torch.float64), "values outside"),
    ],
)
def test_draws_need_uniforms(given_uniforms, got):
    with pytest.raises(ValueError, match=rf"\(3,\) float64 in \[0, 1\), got .*{got}|{got}"):
        select(torch.zeros(3, 4), "sampled:8,realized=0", uniforms=given_uniforms)


# Where u comes from


def plain_uniform(seed: int, epoch: int, digest: bytes, position: int) -> float:
    """The hash of `uniforms`, from its docstring, in Python's own numbers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    key = 0
    halves = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    for word in (seed, epoch, *halves):
        key = mix((key ^ word) + golden & mask)
    return (mix(key + (position + 1) * golden & mask) >> 11) / 2**53


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**64 - 1),
    digest=st.binary(min_size=16, max_size=16),
    position=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_uniforms_are_those_of_their_docstring(seed, epoch, digest, position):
    u = uniforms(seed, epoch, digest, torch.tensor([position]))
    assert u.dtype == torch.float64
    assert u.tolist() == [plain_uniform(seed, epoch, digest, position)]
    assert 0 <= float(u) < 1


def test_golden_uniforms():
    """Change these and every recorded request draws anew."""
    zeros = uniforms(0, 0, bytes(16), torch.arange(3)).tolist()
    assert zeros == [0.47141042966848024, 0.7247520786262142, 0.3030308965844536]
    large = uniforms(2**64 - 1, 7, bytes(range(16)), torch.tensor([0, 1023])).tolist()
    assert large == [0.542236215290076, 0.9652042749471217]


def test_uniforms_of_a_part_are_those_of_the_whole():
    whole = uniforms(1, 2, b"0123456789abcdef", torch.arange(100))
    assert torch.equal(whole[40:60], uniforms(1, 2, b"0123456789abcdef", torch.arange(40, 60)))


def test_uniforms_depend_on_all_that_was_asked():
    positions = torch.arange(4)
    asked = [(0, 0, bytes(16)), (1, 0, bytes(16)), (0, 1, bytes(16)), (1, 1, bytes(16))]
    asked += [(0, 0, bytes([0] * 15 + [1])), (0, 0, bytes([1] + [0] * 15))]
    rows = [tuple(uniforms(*what, positions).tolist()) for what in asked]
    assert len({value for row in rows for value in row}) == 4 * len(asked)


def test_uniforms_are_spread_evenly():
    u = uniforms(3, 0, b"0123456789abcdef", torch.arange(100_000))
    shares = torch.histc(u, 100, 0, 1)
    assert float(((shares - 1000) ** 2 / 1000).sum()) < 150  # chi-square, 99 degrees: p = 0.0007
    assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.01


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    for what in ((seed, 0), (0, seed)):
        with pytest.raises(ValueError, match=r"seed and epoch must be 0 to 2\*\*64 - 1"):
            uniforms(*what, bytes(16), torch.arange(1))


def test_a_digest_of_another_length_is_refused():
    with pytest.raises(ValueError, match="16 bytes, got 15"):
        uniforms(0, 0, bytes(15), torch.arange(1))
