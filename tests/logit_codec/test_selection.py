"""select against an oracle that normalises the whole row in float64 and sorts it stably."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from logit_codec import (
    CodecError,
    DenseSpec,
    GivenIdsSpec,
    TargetSpec,
    TopKSpec,
    TopKTargets,
    decode,
    encode,
    parse_targets,
    select,
)
from tests.support import codec_oracle as oracle

VOCABULARIES = (2, 17, 1000, 1001, 32003)
LARGE = 262_144
TEMPERATURES = (0.7, 1.0, 2.0)
KINDS_OF_LOGITS = (
    "random",
    "tied",
    "bf16_rounded",
    "constant",
    "minus_inf",
    "signed_zeros",
    "tied_from_the_end",
)


def make_logits(name: str, num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_rows, vocab_size, generator=generator) * 4
    if name == "random":
        return normal
    if name == "tied":
        return torch.randint(-2, 3, (num_rows, vocab_size), generator=generator).float()
    if name == "bf16_rounded":
        return normal.bfloat16().float()
    if name == "constant":
        return torch.full((num_rows, vocab_size), -3.25)
    if name == "minus_inf":
        masked = torch.rand(num_rows, vocab_size, generator=generator) < 0.5
        masked[:, -1] = False
        return normal.masked_fill(masked, -math.inf)
    if name == "signed_zeros":
        signs = torch.randint(2, (num_rows, vocab_size), generator=generator)
        return torch.where(signs == 0, 0.0, -0.0)
    if name == "tied_from_the_end":
        # The maximum stands in the last columns only, which are no whole block.
        logits = normal.clamp(max=3.0)
        logits[:, -vocab_size // 3 :] = 3.0
        return logits
    raise AssertionError(name)


def ks(vocab_size: int) -> list[int]:
    """1, some between, and all of a small vocabulary."""
    values = {1, 2, 5, 64, vocab_size if vocab_size <= 1001 else 1000}
    return sorted(k for k in values if k <= vocab_size)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """To float32's precision of a logprob that came from logits of the same size."""
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("kind", KINDS_OF_LOGITS)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_top_k_keeps_the_ids_of_a_stable_sort(vocab_size, kind):
    logits = make_logits(kind, 7, vocab_size)
    before = logits.clone()
    finite = torch.isfinite(logits).tolist()
    ranking = oracle.ranking(logits).tolist()
    for k in ks(vocab_size):
        expected = [
            sorted(i for i in row[:k] if finite[number][i])  # an id of probability 0 is no entry
            for number, row in enumerate(ranking)
        ]
        targets = select(logits, TopKSpec(k, realized=False))
        assert oracle.kept_ids(targets) == expected, k
    assert torch.equal(logits, before)
    assert torch.equal(torch.signbit(logits), torch.signbit(before))


@pytest.mark.parametrize("kind", KINDS_OF_LOGITS)
def test_top_k_keeps_the_ids_of_a_stable_sort_of_a_large_vocabulary(kind):
    logits = make_logits(kind, 2, LARGE)
    for k in (1, 64):
        expected = oracle.top_ids(logits, k)
        assert oracle.kept_ids(select(logits, TopKSpec(k, realized=False))) == expected


@pytest.mark.parametrize("kind", ["tied", "tied_from_the_end"])
def test_the_number_of_threads_does_not_change_what_is_kept(kind):
    logits = make_logits(kind, 4, 32003)
    spec = TopKSpec(64, realized=False)
    one = select(logits, spec)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        several = select(logits, spec)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.token_ids, several.token_ids)
    torch.testing.assert_close(one.logprobs, several.logprobs)


def test_ties_at_k_go_to_the_lowest_id():
    logits = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    targets = select(logits, TopKSpec(3, realized=False))
    assert oracle.kept_ids(targets) == [[0, 1, 3], [0, 1, 2]]


def test_a_tie_between_blocks_goes_to_the_lowest_id():
    """The maxima of many blocks of a large row are equal: -0.0 in the first, 0.0 in the others."""
    logits = torch.full((1, 32003), -1.0)
    logits[0, 100::50] = 0.0
    logits[0, 100] = -0.0
    targets = select(logits, TopKSpec(8, realized=False))
    assert oracle.kept_ids(targets) == [list(range(100, 500, 50))]


def test_bfloat16_logits_are_kept_as_their_float32_values():
    logits = make_logits("random", 5, 1001).bfloat16()
    before = logits.clone()
    spec = TopKSpec(64, entropy=True)
    realized = torch.arange(5)
    narrow = select(logits, spec, realized_ids=realized)
    wide = select(logits.float(), spec, realized_ids=realized)
    assert torch.equal(logits, before)
    assert oracle.kept_ids(narrow) == oracle.top_ids(logits, 64)
    for name, value in narrow._tensors().items():
        assert torch.equal(value, getattr(wide, name)), name
        assert value.dtype == getattr(wide, name).dtype


def check_against_oracle(logits: Tensor, specs: list[TargetSpec], temperature: float) -> None:
    """Every number that select returns for each of the specs, and that the logits stay."""
    num_rows, vocab_size = logits.shape
    realized = torch.arange(num_rows) * 7 % vocab_size
    before = logits.clone()
    expected = oracle.logprobs(logits, temperature)
    expected_realized = expected.gather(1, realized[:, None])[:, 0]
    expected_entropy = oracle.entropy(logits, temperature)
    expected_log_z = oracle.log_z(logits, temperature)
    for spec in specs:
        spec = replace(spec, entropy=True)
        targets = select(logits, spec, temperature=temperature, realized_ids=realized)
        assert torch.equal(logits, before)
        assert (targets.vocab_size, targets.temperature) == (vocab_size, temperature)
        assert_close(targets.log_z, expected_log_z)
        assert_close(targets.entropy, expected_entropy)
        assert_close(targets.realized_logprob, expected_realized)
        if isinstance(targets, TopKTargets):
            check_entries_and_tail(targets, expected)
        elif spec == DenseSpec(32, entropy=True):
            assert_close(targets.logprobs, expected)
        else:
            torch.testing.assert_close(targets.logprobs.double(), expected, rtol=2**-8, atol=1e-5)


def check_entries_and_tail(targets: TopKTargets, expected: Tensor) -> None:
    rows, ids = targets.entry_rows(), targets.token_ids
    assert_close(targets.logprobs, expected[rows, ids])
    probabilities = expected.exp()
    mass = torch.zeros(len(targets), dtype=torch.float64)
    mass.index_add_(0, rows, probabilities[rows, ids])
    probabilities[rows, ids] = 0.0
    tail = targets.tail_logprob.double()
    assert (tail <= 0).all()
    assert (tail.exp() - probabilities.sum(1)).abs().max() < 1e-6
    # The kept mass too, relative to itself: it is what the decoder gives to the entries.
    torch.testing.assert_close(-torch.expm1(tail), mass, rtol=2e-5, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_every_number_is_that_of_the_oracle(vocab_size, temperature):
    several = min(64, vocab_size)
    specs = [TopKSpec(1), TopKSpec(several), TopKSpec(several, min_p=1 / 256)]
    specs += [TopKSpec(min(1000, vocab_size)), DenseSpec(32), DenseSpec(16)]
    for kind in ("random", "tied", "bf16_rounded", "constant"):
        check_against_oracle(make_logits(kind, 3, vocab_size, seed=1), specs, temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_every_number_is_that_of_the_oracle_for_a_large_vocabulary(temperature):
    """A flat row keeps 0.0002 of its mass, a peaked one all but 1e-6 of it."""
    logits = make_logits("random", 3, LARGE)
    logits[0] /= 1000
    logits[1, LARGE - 1] = logits[1].max() + 45.0
    logits[2] += 50.0
    specs = [TopKSpec(64), TopKSpec(1), TopKSpec(128, min_p=1 / 256), DenseSpec(32)]
    check_against_oracle(logits, specs, temperature)


def test_the_tail_of_a_flat_row_is_what_its_entries_leave():
    targets = select(torch.zeros(1, LARGE), TopKSpec(1, realized=False))
    assert targets.tail_logprob.item() == pytest.approx(math.log1p(-1 / LARGE), rel=1e-6)
    assert targets.logprobs.item() == pytest.approx(-math.log(LARGE), rel=1e-6)


@pytest.mark.parametrize("gap", [5.0, 15.0, 30.0, 60.0, 80.0])
def test_the_tail_of_a_peaked_row_is_exact_where_one_minus_the_kept_mass_is_not(gap):
    logits = torch.zeros(1, 1000)
    logits[0, 123] = gap
    targets = select(logits, TopKSpec(1, realized=False))
    expected = math.log(999) - math.log(999 + math.exp(gap))
    assert targets.tail_logprob.item() == pytest.approx(expected, rel=1e-6)


def test_nothing_is_left_when_every_id_is_kept():
    targets = select(make_logits("random", 3, 17), TopKSpec(17, realized=False))
    assert targets.tail_logprob.tolist() == [-math.inf] * 3


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_min_p_keeps_every_id_from_min_p_on_up_to_the_cap(vocab_size, temperature):
    logits = make_logits("random", 8, vocab_size, seed=2)
    probabilities = oracle.logprobs(logits, temperature).exp()
    best = probabilities.argmax(1).tolist()
    ranking = oracle.ranking(logits).tolist()
    for min_p, cap in ((1 / 256, 128), (1 / 256, 3), (0.002, 1000), (0.9, 4)):
        # No probability is so near to min_p that float32 could take it for the other side.
        assert ((probabilities / min_p - 1).abs() > 1e-5).all()
        above = (probabilities >= min_p).tolist()
        expected = [
            sorted(i for i in row[:cap] if above[number][i]) or [best[number]]
            for number, row in enumerate(ranking)
        ]
        spec = TopKSpec(cap, min_p=min_p, realized=False)
        assert oracle.kept_ids(select(logits, spec, temperature=temperature)) == expected


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_it_up_to_the_cap(vocab_size, temperature):
    logits = make_logits("random", 8, vocab_size, seed=2)
    probabilities = oracle.logprobs(logits, temperature).exp()
    ranking = oracle.ranking(logits)
    ranked = probabilities.gather(1, ranking)
    before = ranked.cumsum(1) - ranked  # the mass of likelier ids
    for top_p, min_p, cap in ((0.95, 0.0, 128), (0.95, 0.0, 3), (0.5, 0.0, 1000), (0.9, 0.01, 64)):
        # No sum is so near to top_p that float32 could take it for the other side.
        assert ((before[:, :cap] / top_p - 1).abs() > 1e-6).all()
        sizes = ((before < top_p) & (ranked >= min_p)).sum(1).clamp(1, cap).tolist()
        expected = [sorted(row[:size]) for row, size in zip(ranking.tolist(), sizes, strict=True)]
        spec = TopKSpec(cap, top_p=top_p, min_p=min_p, realized=False)
        targets = select(logits, spec, temperature=temperature)
        assert oracle.kept_ids(targets) == expected
        assert isinstance(targets, TopKTargets)
        check_entries_and_tail(targets, oracle.logprobs(logits, temperature))


def test_top_p_ends_with_the_id_that_reaches_it_exactly():
    for top_p, size in ((0.75, 192), (0.7501, 193), (1e-9, 1), (1.0, 256)):
        targets = select(torch.zeros(1, 256), TopKSpec(300, top_p=top_p, realized=False))
        assert oracle.kept_ids(targets) == [list(range(size))]


def test_min_p_keeps_an_id_that_is_exactly_at_min_p():
    spec = TopKSpec(300, min_p=1 / 256, realized=False)
    assert oracle.kept_ids(select(torch.zeros(1, 256), spec)) == [list(range(256))]
    assert oracle.kept_ids(select(torch.zeros(1, 257), spec)) == [[0]]


def test_min_p_keeps_the_lowest_of_the_best_ids_when_none_reaches_it():
    logits = torch.zeros(2, 1000)
    logits[1, 700:] = 1.0
    targets = select(logits, TopKSpec(50, min_p=0.5, realized=False))
    assert oracle.kept_ids(targets) == [[0], [700]]


def test_ids_of_probability_zero_are_no_entries():
    logits = torch.full((2, 1000), -math.inf)
    logits[0, 5] = logits[1, 6] = logits[1, 999] = 2.0
    targets = select(logits, TopKSpec(64, realized=False, entropy=True))
    assert oracle.kept_ids(targets) == [[5], [6, 999]]
    assert targets.tail_logprob.tolist() == [-math.inf] * 2
    torch.testing.assert_close(targets.entropy, torch.tensor([0.0, math.log(2)]))


def test_the_realized_logprob_of_an_impossible_token_is_minus_inf():
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    for spec in (TopKSpec(2), DenseSpec()):
        targets = select(logits, spec, realized_ids=torch.tensor([1]))
        assert targets.realized_logprob.tolist() == [-math.inf]


@pytest.mark.parametrize(
    "text", ["top_k:5", "top_k:min_p=1/256,max_k=50", "dense:f32", "dense:bf16"]
)
def test_padding_columns_of_minus_inf_get_probability_zero_and_change_nothing_else(text):
    logits = make_logits("random", 3, 17)
    spec = parse_targets(text + ",entropy=1")
    realized = torch.tensor([0, 5, 16])
    padded = select(
        torch.nn.functional.pad(logits, (0, 3), value=-math.inf), spec, realized_ids=realized
    )
    plain = select(logits, spec, realized_ids=realized)
    assert padded.vocab_size == 20
    assert (padded.to_dense()[:, 17:] == 0).all()
    torch.testing.assert_close(padded.to_dense()[:, :17], plain.to_dense())
    for name in ("realized_logprob", "entropy", "log_z"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))
    if spec.kind == "dense":
        assert (padded.logprobs[:, 17:] == -math.inf).all()
    encode(padded)


@pytest.mark.parametrize(
    "text",
    [*("top_k:4", "top_k:min_p=1/256,max_k=4", "top_k:top_p=0.9"), "dense:f32", "dense:bf16"],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("vocab_size", [17, 1001])
def test_a_row_that_is_not_finite_comes_back_as_nan_and_encode_refuses_it(
    text, temperature, bad, vocab_size
):
    logits = make_logits("random", 6, vocab_size)
    if bad == "all -inf":
        logits[4] = -math.inf
    else:
        logits[4, 3] = bad
    spec = parse_targets(text + ",entropy=1")
    targets = select(logits, spec, temperature=temperature, realized_ids=torch.arange(6) + 7)
    row = targets[4:5]
    assert row.log_z.isnan().all()
    assert row.entropy.isnan().all()
    assert row.logprobs.isnan().any()
    assert len(row.logprobs) >= 1
    with pytest.raises(CodecError, match="row 4 ") as raised:
        encode(targets)
    assert raised.value.row == 4
    # The rows beside it are untouched.
    good = [0, 1, 2, 3, 5]
    alone = select(logits[good], spec, temperature=temperature, realized_ids=torch.tensor(good) + 7)
    torch.testing.assert_close(targets.log_z[good], alone.log_z)
    encode(targets[:4])
    encode(targets[5:])


@pytest.mark.parametrize("text", ["top_k:5,entropy=1", "dense:f32,entropy=1", "dense:bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_are_targets_of_no_rows(text, dtype):
    logits = torch.zeros(0, 17, dtype=dtype)
    spec = parse_targets(text)
    empty = torch.zeros(0, dtype=torch.int64)
    targets = select(logits, spec, temperature=2.0, realized_ids=empty)
    assert (len(targets), targets.vocab_size, targets.temperature) == (0, 17, 2.0)
    some = select(torch.zeros(1, 17, dtype=dtype), spec, realized_ids=empty.new_zeros(1))
    assert targets._tensors().keys() == some._tensors().keys()
    for name, value in targets._tensors().items():
        assert value.dtype == getattr(some, name).dtype
    encode(targets)


def test_no_rows_need_a_fitting_k_as_well():
    with pytest.raises(ValueError, match="at most the 17 ids of the vocabulary, got 18"):
        select(torch.zeros(0, 17), TopKSpec(18, realized=False))


def test_only_what_the_spec_asks_for_is_returned():
    logits = make_logits("random", 3, 17)
    bare = {"realized": False, "entropy": False, "log_z": False}
    for spec in (TopKSpec(4, **bare), DenseSpec(**bare)):
        targets = select(logits, spec, realized_ids=torch.zeros(3, dtype=torch.int64))
        assert targets.realized_logprob is None
        assert targets.entropy is None
        assert targets.log_z is None
        for name in bare:
            with_one = replace(spec, **{name: True})
            more = select(logits, with_one, realized_ids=torch.zeros(3, dtype=torch.int64))
            assert len(more._tensors()) == len(targets._tensors()) + 1


def test_the_rows_of_a_batch_do_not_change_each_other():
    logits = make_logits("random", 9, 1001)
    spec = TopKSpec(64, realized=False, entropy=True)
    together = select(logits, spec, temperature=0.7)
    for row in range(9):
        alone = select(logits[row : row + 1], spec, temperature=0.7)
        part = together[row : row + 1]
        assert torch.equal(alone.token_ids, part.token_ids)
        for name in ("logprobs", "tail_logprob", "entropy", "log_z"):
            torch.testing.assert_close(getattr(alone, name), getattr(part, name))


def test_a_k_above_the_vocabulary_is_refused_but_not_a_cap():
    logits = make_logits("random", 3, 17)
    with pytest.raises(ValueError, match="at most the 17 ids of the vocabulary, got 18"):
        select(logits, TopKSpec(18, realized=False))
    targets = select(logits, TopKSpec(18, min_p=1e-30, realized=False))
    assert oracle.kept_ids(targets) == [list(range(17))] * 3
    flat = torch.zeros(3, 17)
    targets = select(flat, TopKSpec(18, top_p=1.0, realized=False))
    assert oracle.kept_ids(targets) == [list(range(17))] * 3


def test_a_spec_may_be_given_as_its_string():
    logits = make_logits("random", 3, 17)
    for text in ("top_k:4,realized=0", "dense:bf16,realized=0"):
        by_text, by_spec = select(logits, text), select(logits, parse_targets(text))
        assert repr(by_text) == repr(by_spec)
        assert torch.equal(by_text.logprobs, by_spec.logprobs)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature):
    with pytest.raises(ValueError, match=f"positive and finite, got {temperature}"):
        select(torch.zeros(1, 17), TopKSpec(1, realized=False), temperature=temperature)


REALIZED_IDS = r"realized_ids must have shape \({},\) unless the spec says realized=0, got {}"


@pytest.mark.parametrize("spec", [TopKSpec(1), DenseSpec()])
def test_the_realized_ids_are_needed_unless_the_spec_leaves_them_out(spec):
    for num_rows in (0, 1, 3):
        with pytest.raises(ValueError, match=REALIZED_IDS.format(num_rows, "none")):
            select(torch.zeros(num_rows, 17), spec)
        targets = select(torch.zeros(num_rows, 17), replace(spec, realized=False))
        assert targets.realized_logprob is None


@pytest.mark.parametrize("spec", [TopKSpec(1), DenseSpec()])
@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("shape", [(1,), (2,), (4,), (3, 1), (1, 3), ()])
def test_realized_ids_of_another_shape_are_refused_with_both(spec, num_rows, shape):
    message = REALIZED_IDS.format(num_rows, "shape " + re.escape(str(shape)))
    with pytest.raises(ValueError, match=message):
        select(torch.zeros(num_rows, 17), spec, realized_ids=torch.zeros(shape, dtype=torch.int64))


def test_a_spec_of_no_kind_is_refused():
    with pytest.raises(ValueError, match="no selection for TargetSpec"):
        select(torch.zeros(1, 17), TargetSpec(realized=False))


# The kinds that keep what a client names, and states

STATES = torch.randn(6, 2, 40, generator=torch.Generator().manual_seed(3))


def given_rows(num_rows: int, vocab_size: int) -> Tensor:
    """(R, 12) ids: any, neighbours within a block, twice the same, the last ones, and fillers."""
    generator = torch.Generator().manual_seed(vocab_size)
    ids = torch.randint(vocab_size, (num_rows, 12), generator=generator)
    ids[:, 3:6] = torch.arange(3) + vocab_size // 2
    ids[:, 6] = ids[:, 0]
    ids[::2, 7:] = -1
    ids[1::2, 7:9] = vocab_size - 1 - torch.arange(2)
    return ids


def check_given(logits: Tensor, given: Tensor, temperature: float, realized: bool = True) -> None:
    """Every number of given_ids, relative to itself where it is small."""
    num_rows = len(logits)
    targets = select(
        logits,
        GivenIdsSpec(32, ranks=True, realized=realized, entropy=True),
        temperature=temperature,
        realized_ids=torch.arange(num_rows),
        given_ids=given,
    )
    expected = oracle.logprobs(logits, temperature)
    kept = [sorted(set(row) - {-1}) for row in given.tolist()]
    assert oracle.kept_ids(targets) == kept
    rows, ids = targets.entry_rows(), targets.token_ids
    assert_close(targets.logprobs, expected[rows, ids])
    p = expected.exp()
    rest = p.index_put((rows, ids), p.new_zeros(())).sum(1)
    mass = p.index_put((rows, ids), p.new_zeros(()))
    mass = (p - mass).sum(1)
    tail = targets.tail_logprob.double()
    torch.testing.assert_close(tail.exp(), rest, rtol=2e-5, atol=1e-37)
    torch.testing.assert_close(-torch.expm1(tail), mass, rtol=2e-5, atol=2e-7)
    larger = logits[rows].double() > logits[rows, ids].double()[:, None]
    assert torch.equal(targets.ranks, larger.sum(1).int())
    assert_close(targets.log_z, oracle.log_z(logits, temperature))
    assert_close(targets.entropy, oracle.entropy(logits, temperature))
    encode(targets, bits=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab_size", [50, 1001, 32_000])
def test_given_ids_have_the_numbers_of_the_oracle(vocab_size, temperature, dtype):
    for kind in ("random", "tied", "minus_inf"):
        logits = make_logits(kind, 6, vocab_size).to(dtype)
        check_given(logits, given_rows(6, vocab_size), temperature)


@pytest.mark.parametrize("gap", [5.0, 30.0, 80.0])
def test_the_tail_of_given_ids_is_exact_however_little_is_left_or_given(gap):
    logits = make_logits("random", 6, 1001) / 4
    logits[:3, 700] += gap  # nearly all of the mass is given, and then nearly nothing
    logits[3:, 0] += gap
    given = torch.tensor([[3, 701, 700], [700, -1, -1], [640, 700, 1000]] * 2)
    check_given(logits, given, 1.0)


def test_given_ids_may_be_the_whole_vocabulary_or_impossible():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0], [3.0, -math.inf, -math.inf, 3.0]])
    check_given(logits, torch.tensor([[0, 1, 2, 3], [1, 2, -1, -1]]), 1.0)
    given = torch.tensor([[0, 1, 3], [1, 2, -1]])
    targets = select(logits, GivenIdsSpec(32, realized=False), given_ids=given)
    assert targets.tail_logprob.tolist() == [-math.inf, 0.0]
    assert targets.logprobs[3:].tolist() == [-math.inf] * 2


def test_given_ids_are_named_for_every_row_and_within_the_vocabulary():
    spec = GivenIdsSpec(realized=False)
    with pytest.raises(ValueError, match=r"given_ids must be torch\.int64 of shape .3, .*got none"):
        select(torch.zeros(3, 17), spec)
    with pytest.raises(ValueError, match=r"given_ids must be .*got torch.int64 of shape \(2, 1\)"):
        select(torch.zeros(3, 17), spec, given_ids=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="below the vocabulary's 17, got 17"):
        select(torch.zeros(1, 17), spec, given_ids=torch.tensor([[17]]))


def test_realized_is_one_logprob_also_of_an_impossible_token():
    logits = make_logits("random", 6, 1001)
    logits[2, 9] = -math.inf
    targets = select(logits, "realized", temperature=2.0, realized_ids=torch.full((6,), 9))
    assert_close(targets.realized_logprob, oracle.logprobs(logits, 2.0)[:, 9])
    assert targets.realized_logprob[2] == -math.inf
    assert targets._tensors().keys() == {"realized_logprob"}
    decoded = decode(encode(targets))
    assert torch.equal(decoded.realized_logprob, targets.realized_logprob)


def test_hidden_states_come_back_within_their_dtype():
    states = STATES[:, 0].clone()
    states[1] = 0.0
    logits = torch.zeros(6, 17)
    wide = select(logits, "hidden:bf16,realized=0", hidden=states)
    assert torch.equal(wide.values, states.bfloat16())
    narrow = select(logits, "hidden:int8,realized=0", hidden=states)
    assert (narrow.hidden - states).abs().amax(1).le(states.abs().amax(1) / 254 * 1.001).all()
    assert narrow.hidden[1].eq(0).all()
    features = select(logits, "features:layers=1+4,realized=0", features=STATES)
    assert torch.equal(features.hidden, STATES.bfloat16())
    assert features.layers == (1, 4)
    for text, wanted in (("hidden", "hidden must be numbers"), ("features:layers=1", "features")):
        with pytest.raises(ValueError, match=f"{wanted}.*got none"):
            select(logits, text + ",realized=0" if ":" in text else text + ":realized=0")


@pytest.mark.parametrize(
    "text",
    ["given_ids:ranks=1", "given_ids:bits=32", "realized", "hidden:int8", "hidden:bf16"],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
def test_a_new_kind_refuses_a_row_that_is_not_finite_and_leaves_the_others_alone(text, bad):
    logits, states = make_logits("random", 6, 1001), STATES[:, 0].clone()
    value = -math.inf if bad == "all -inf" else bad
    logits[4, slice(None) if bad == "all -inf" else 3] = value
    states[4, 3] = value
    spec = parse_targets(text).for_head("ab" * 16, 40)
    asked = {"realized_ids": torch.arange(6) + 7, "given_ids": given_rows(6, 1001)}
    targets = select(logits, spec, hidden=states, **asked)
    with pytest.raises(CodecError, match="row 4 ") as raised:
        encode(targets)
    assert raised.value.row == 4
    good = [0, 1, 2, 3, 5]
    asked = {name: value[good] for name, value in asked.items()}
    alone = select(logits[good], spec, hidden=states[good], **asked)
    rest = targets[torch.tensor(good)]
    assert encode(rest) == encode(alone)


@pytest.mark.parametrize(
    "text",
    [
        "given_ids:ranks=1,entropy=1",
        "realized",
        "hidden:int8",
        "hidden:bf16",
        "features:layers=1+4",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_are_targets_of_a_new_kind_too(text, dtype):
    empty = torch.zeros(0, dtype=torch.int64)
    targets = select(
        torch.zeros(0, 17, dtype=dtype),
        parse_targets(text).for_head("ab" * 16, 40),
        realized_ids=empty,
        given_ids=torch.zeros(0, 3, dtype=torch.int64),
        hidden=STATES[:0, 0].to(dtype),
        features=STATES[:0].to(dtype),
    )
    data = encode(targets)
    decoded = decode(data, given_ids=getattr(targets, "given", None))
    assert len(decoded) == len(targets) == 0
    assert repr(decoded) == repr(targets)
