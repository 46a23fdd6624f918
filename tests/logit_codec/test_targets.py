import math
import re
from itertools import pairwise

import pytest
import torch

from logit_codec import (
    DenseSpec,
    DenseTargets,
    FeaturesTargets,
    GivenIdsTargets,
    HiddenTargets,
    RealizedTargets,
    SampledTargets,
    Targets,
    TeacherHead,
    TopKSpec,
    TopKTargets,
    select,
)
from logit_codec.kinds import cells_of


def top_k(**changed) -> TopKTargets:
    """Three rows over 5 ids, with 2, 1 and 3 entries."""
    fields = {
        "vocab_size": 5,
        "temperature": 1.0,
        "row_splits": torch.tensor([0, 2, 3, 6]),
        "token_ids": torch.tensor([0, 4, 2, 1, 2, 3]),
        "logprobs": torch.tensor([0.5, 0.25, 1.0, 0.2, 0.3, 0.1]).log(),
        "tail_logprob": torch.tensor([0.25, 0.0, 0.4]).log(),
        "realized_logprob": torch.tensor([-1.0, -2.0, -3.0]),
        "entropy": torch.tensor([0.1, 0.2, 0.3]),
        "log_z": torch.tensor([7.0, 8.0, 9.0]),
        **changed,
    }
    return TopKTargets(**fields)


def sampled(**changed) -> SampledTargets:
    """Three rows of 8 draws over 5 ids, with 2, 1 and 3 entries."""
    fields = {
        "vocab_size": 5,
        "temperature": 1.0,
        "num_draws": 8,
        "row_splits": torch.tensor([0, 2, 3, 6]),
        "token_ids": torch.tensor([0, 4, 2, 1, 2, 3]),
        "counts": torch.tensor([6, 2, 8, 1, 4, 3]),
        "log_z": torch.tensor([7.0, 8.0, 9.0]),
        **changed,
    }
    return SampledTargets(**fields)


def dense(**changed) -> DenseTargets:
    """Three rows over 4 ids."""
    logits = torch.arange(12.0).view(3, 4).sin()
    fields = {
        "vocab_size": 4,
        "temperature": 1.0,
        "logprobs": logits.log_softmax(1),
        "log_z": logits.logsumexp(1),
        **changed,
    }
    return DenseTargets(**fields)


def given(**changed) -> GivenIdsTargets:
    """Three rows over 5 ids, of which 2, 1 and 3 were named."""
    fields = {
        "vocab_size": 5,
        "temperature": 1.0,
        "row_splits": torch.tensor([0, 2, 3, 6]),
        "token_ids": torch.tensor([0, 4, 2, 1, 2, 3]),
        "logprobs": torch.tensor([0.5, 0.25, 0.0, 0.2, 0.3, 0.1]).log(),
        "tail_logprob": torch.tensor([0.25, 1.0, 0.4]).log(),
        "ranks": torch.tensor([0, 1, 4, 3, 1, 4], dtype=torch.int32),
        "log_z": torch.tensor([7.0, 8.0, 9.0]),
        **changed,
    }
    return GivenIdsTargets(**fields)


WEIGHT = torch.arange(20.0).view(5, 4).cos()
HEAD = TeacherHead(weight=WEIGHT, softcap=9.0, effective_vocab_size=4, fingerprint="ab" * 16)


def hidden(**changed) -> HiddenTargets:
    """Three rows of states of 4 numbers, with a head of 5 ids, one of them padding."""
    fields = {
        "vocab_size": 5,
        "temperature": 2.0,
        "values": torch.tensor([[127, 3, -9, 0], [-127, 0, 1, 5], [0, 0, 127, 0]]).to(torch.int8),
        "scale": torch.tensor([0.5, 0.25, 1.0]),
        "head_fingerprint": HEAD.fingerprint,
        "head": HEAD,
        "log_z": torch.tensor([7.0, 8.0, 9.0]),
        **changed,
    }
    return HiddenTargets(**fields)


def realized(**changed) -> RealizedTargets:
    fields = {"realized_logprob": torch.tensor([-1.0, -math.inf, -3.0]), **changed}
    return RealizedTargets(vocab_size=5, temperature=1.0, **fields)


def features(**changed) -> FeaturesTargets:
    """Three rows of states of 4 numbers after 2 layers."""
    fields = {
        "hidden": torch.arange(24.0).view(3, 2, 4).bfloat16(),
        "layers": (2, 5),
        "log_z": torch.tensor([7.0, 8.0, 9.0]),
        **changed,
    }
    return FeaturesTargets(vocab_size=5, temperature=1.0, **fields)


EACH = pytest.mark.parametrize("make", [top_k, sampled, dense, given, hidden])
STATES = pytest.mark.parametrize("make", [hidden, realized, features])


def same(a: Targets, b: Targets) -> bool:
    mine, theirs = a._tensors(), b._tensors()
    return (
        type(a) is type(b)
        and (a.vocab_size, a.temperature) == (b.vocab_size, b.temperature)
        and mine.keys() == theirs.keys()
        and all(
            mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
            for name in mine
        )
    )


@EACH
def test_len_is_the_number_of_rows(make):
    targets = make()
    assert len(targets) == targets.num_rows == 3


@EACH
@pytest.mark.parametrize("rows", [slice(a, b) for a in range(-4, 5) for b in (*range(-4, 5), None)])
def test_a_slice_has_the_rows_that_a_list_would_have(make, rows):
    targets = make()
    dense_rows = targets.to_dense()
    sliced = targets[rows]
    assert len(sliced) == len(range(3)[rows])
    assert torch.equal(sliced.to_dense(), dense_rows[rows])
    assert torch.equal(sliced.log_z, targets.log_z[rows])
    for name in targets.row_fields:
        value = getattr(targets, name)
        if value is None:
            assert getattr(sliced, name) is None
        else:
            assert torch.equal(getattr(sliced, name), value[rows])


def test_the_splits_of_a_slice_begin_at_zero():
    sliced = top_k()[1:]
    assert sliced.row_splits.tolist() == [0, 1, 4]
    assert sliced.token_ids.tolist() == [2, 1, 2, 3]
    assert sliced.entry_rows().tolist() == [0, 1, 1, 1]


def test_a_slice_shares_the_values_of_what_it_was_cut_from():
    for targets in (top_k(), dense()):
        storage = targets.logprobs.untyped_storage().data_ptr()
        assert targets[1:].logprobs.untyped_storage().data_ptr() == storage


@EACH
def test_only_slices_in_steps_of_one_are_rows(make):
    targets = make()
    with pytest.raises(TypeError, match=r"targets\[2:5\].*got 1"):
        targets[1]
    with pytest.raises(ValueError, match="steps of 1, got 2"):
        targets[::2]
    with pytest.raises(ValueError, match="steps of 1, got -1"):
        targets[::-1]


@EACH
@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2), (0, 3), (0, 0, 1, 1, 3)])
def test_cat_puts_the_slices_together_again(make, cuts):
    targets = make()
    edges = [0, *cuts, 3]
    parts = [targets[a:b] for a, b in pairwise(edges)]
    assert same(Targets.cat(parts), targets)


@pytest.mark.parametrize("make", [top_k, sampled, dense, given, hidden, realized, features])
def test_rows_are_taken_by_their_numbers_as_often_as_they_are_named(make):
    targets = make()
    numbers = [2, 0, 2, 1]
    taken = targets[torch.tensor(numbers)]
    assert len(taken) == 4
    assert same(taken, Targets.cat([targets[row : row + 1] for row in numbers]))
    assert same(targets[torch.arange(3)], targets)


@STATES
def test_rows_without_a_distribution_are_sliced_joined_and_moved(make):
    targets = make()
    for cut in range(4):
        parts = [targets[:cut], targets[cut:]]
        assert [len(part) for part in parts] == [cut, 3 - cut]
        assert same(Targets.cat(parts), targets)
    for name, value in targets[1:]._tensors().items():
        assert torch.equal(value, getattr(targets, name)[1:])
    moved = targets.to("meta")
    assert (
        {value.device.type for value in moved._tensors().values()}
        == {"meta"}
        == {moved.device.type}
    )
    assert targets.nbytes == sum(value.nbytes for value in targets._tensors().values())


def test_what_tells_no_distribution_says_so():
    with pytest.raises(ValueError, match="one logprob per row, which is no distribution"):
        realized().to_dense()
    with pytest.raises(ValueError, match="states of layers, which are no distribution"):
        features().to_dense()
    with pytest.raises(ValueError, match=r"teacher's vocabulary head: pass teacher_head="):
        hidden(head=None).to_dense()
    for targets in (realized(), features()):
        assert targets.most_likely().tolist() == [-1] * 3
        assert targets.mode() is None


def test_hidden_states_with_their_head_are_a_distribution():
    targets = hidden()
    states = targets.values.double() * targets.scale.double()[:, None]
    logits = 9.0 * torch.tanh(states @ WEIGHT.double().T / 9.0)
    expected = torch.nn.functional.pad((logits[:, :4] / 2.0).softmax(1), (0, 1))
    torch.testing.assert_close(targets.to_dense().double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(targets.hidden.double(), states)
    ids, p = targets.mode()
    assert torch.equal(ids, expected.argmax(1))
    assert torch.equal(targets.most_likely(), ids)
    torch.testing.assert_close(p.double(), expected.amax(1))
    other = TeacherHead(weight=WEIGHT, effective_vocab_size=5, fingerprint="cd" * 16)
    with pytest.raises(ValueError, match=f"for the head {'ab' * 16}, got {'cd' * 16}"):
        targets.with_head(other)
    # The head follows where it is used: copied with each batch, it would be copied for nothing.
    moved = hidden(head=None).with_head(HEAD).to("meta")
    assert moved.logits(slice(None)).device.type == "meta"


def test_given_ids_without_any_mass_stay_without_it_when_renormalised():
    renormalised = cells_of(given()).renormalized()
    expected = torch.tensor([2 / 3, 1 / 3, 0.0, 1 / 3, 1 / 2, 1 / 6])
    torch.testing.assert_close(renormalised.logprobs.exp(), expected)
    assert renormalised.tail_logprob.tolist() == [-math.inf] * 3


def test_the_mode_of_given_ids_is_unknown_where_another_id_may_be_likelier():
    ids, p = given().mode()
    assert ids.tolist() == [0, -1, -1]
    torch.testing.assert_close(p, torch.tensor([0.5, 0.0, 0.3]))
    assert given().given.token_ids.tolist() == [0, 4, 2, 1, 2, 3]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((given(), given(ranks=None)), "different fields: .*'ranks'"),
        ((hidden(), hidden(head=None, head_fingerprint="cd" * 16)), "different head_fingerprint"),
        (
            (hidden(), hidden(values=hidden().values.bfloat16(), scale=None)),
            "different fields: .*int8",
        ),
        ((features(), features(layers=(2, 6))), r"different layers: \(2, 5\), \(2, 6\)"),
        ((realized(), top_k()), "different kind: realized, top_k"),
    ],
)
def test_cat_refuses_parts_of_the_new_kinds_that_differ(parts, message):
    with pytest.raises(ValueError, match=f"cannot join targets of {message}"):
        Targets.cat(parts)


@pytest.mark.parametrize(
    ("make", "changed", "why"),
    [
        (given, {"ranks": torch.zeros(6)}, "ranks must be torch.int32"),
        (given, {"ranks": torch.zeros(5, dtype=torch.int32)}, r"ranks must be .* \(6,\)"),
        (given, {"tail_logprob": torch.zeros(2)}, r"tail_logprob must be .* \(3,\)"),
        (hidden, {"values": torch.zeros(3, 4)}, r"\(R, D\) int8 or bfloat16, got torch.float32"),
        (hidden, {"values": torch.zeros(3, 0).to(torch.int8)}, r"got torch.int8 of shape \(3, 0\)"),
        (hidden, {"values": torch.zeros(12).to(torch.int8)}, r"of shape \(12,\)"),
        (hidden, {"scale": None}, "int8 values need a scale"),
        (hidden, {"values": torch.zeros(3, 4).bfloat16()}, "bfloat16 values have none"),
        (hidden, {"scale": torch.zeros(2)}, r"scale must be .* \(3,\)"),
        (hidden, {"log_z": torch.zeros(2)}, r"log_z must be .* \(3,\)"),
        (realized, {"realized_logprob": None}, "need realized_logprob"),
        (realized, {"realized_logprob": torch.zeros(3).double()}, "must be torch.float32"),
        (realized, {"entropy": torch.zeros(3)}, "realized_logprob and nothing else"),
        (realized, {"log_z": torch.zeros(3)}, "realized_logprob and nothing else"),
        (features, {"hidden": torch.zeros(3, 2, 4)}, r"\(R, L, D\) bfloat16, got torch.float32"),
        (features, {"hidden": torch.zeros(3, 8).bfloat16()}, r"of shape \(3, 8\)"),
        (features, {"hidden": torch.zeros(3, 2, 0).bfloat16()}, r"of shape \(3, 2, 0\)"),
        (features, {"layers": (1,)}, "1 layers, and states of 2"),
        (features, {"layers": (5, 2)}, r"ascending numbers from 0 to 1000000, got \[5, 2\]"),
    ],
)
def test_what_makes_no_targets_of_a_new_kind_is_refused(make, changed, why):
    with pytest.raises(ValueError, match=why):
        make(**changed)


def test_cat_of_one_part_is_that_part_and_of_none_is_refused():
    targets = top_k()
    assert Targets.cat([targets]) is targets
    with pytest.raises(ValueError, match="at least one part"):
        Targets.cat([])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dense(), "different kind: top_k, dense"),
        (top_k(vocab_size=6), "different vocab_size: 5, 6"),
        (top_k(temperature=2.0), "different temperature: 1.0, 2.0"),
        (top_k(entropy=None), "different fields: .*'entropy'.*"),
    ],
)
def test_cat_refuses_parts_that_differ(other, message):
    with pytest.raises(ValueError, match=f"cannot join targets of {message}"):
        Targets.cat([top_k(), top_k(), other])


def test_cat_refuses_dense_parts_of_different_width():
    """A joined f32 plane would take twice the bytes, at bfloat16's precision for some rows."""
    narrow = dense(logprobs=dense().logprobs.bfloat16())
    for parts in ([narrow, dense()], [dense(), narrow]):
        with pytest.raises(
            ValueError, match=r"cannot join targets of different fields: .*bfloat16"
        ):
            Targets.cat(parts)


@EACH
def test_to_moves_every_tensor(make):
    moved = make().to("meta")
    assert moved.device.type == "meta"
    assert {value.device.type for value in moved._tensors().values()} == {"meta"}
    assert moved.to(torch.device("meta"), non_blocking=True).num_rows == 3
    targets = make()
    assert same(targets.to("cpu"), targets)


def test_to_dense_puts_the_probabilities_at_their_ids_and_leaves_the_tail_out():
    expected = torch.tensor(
        [[0.5, 0, 0, 0, 0.25], [0, 0, 1, 0, 0], [0, 0.2, 0.3, 0.1, 0]], dtype=torch.float32
    )
    torch.testing.assert_close(top_k().to_dense(), expected)
    sums = top_k().to_dense().sum(1) + top_k().tail_logprob.exp()
    torch.testing.assert_close(sums, torch.ones(3))


def test_to_dense_of_dense_is_float32_with_zero_for_padding():
    logprobs = torch.tensor([[0.5, 0.5, 0.0]]).log().bfloat16()
    targets = DenseTargets(vocab_size=3, temperature=1.0, logprobs=logprobs)
    probabilities = targets.to_dense()
    assert probabilities.dtype == torch.float32
    assert probabilities[0, 2] == 0
    torch.testing.assert_close(probabilities, torch.tensor([[0.5, 0.5, 0.0]]), rtol=5e-3, atol=0)


def test_top_k_of_every_id_is_dense():
    logits = torch.randn(4, 17, generator=torch.Generator().manual_seed(0))
    every = select(logits, TopKSpec(17, realized=False))
    dense = select(logits, DenseSpec(realized=False)).to_dense()
    torch.testing.assert_close(every.to_dense(), dense)


def test_repr_shows_shapes_and_no_values():
    assert repr(top_k()) == (
        "TopKTargets(3 rows, vocab_size=5, realized_logprob=float32[3], entropy=float32[3], "
        "log_z=float32[3], row_splits=int64[4], token_ids=int64[6], logprobs=float32[6], "
        "tail_logprob=float32[3], temperature=1.0)"
    )
    assert repr(hidden()) == (
        "HiddenTargets(3 rows, vocab_size=5, log_z=float32[3], values=int8[3, 4], "
        "scale=float32[3], temperature=2.0)"
    )
    assert repr(realized()) == (
        "RealizedTargets(3 rows, vocab_size=5, realized_logprob=float32[3], temperature=1.0)"
    )
    assert repr(dense(log_z=None)) == (
        "DenseTargets(3 rows, vocab_size=4, logprobs=float32[3, 4], temperature=1.0)"
    )


@pytest.mark.parametrize(
    ("make", "name", "value", "allowed", "got"),
    [
        (top_k, "row_splits", torch.tensor([0, 2, 3, 6.0]), "torch.int64", "torch.float32"),
        (top_k, "row_splits", torch.zeros(2, 2, dtype=torch.int64), "(2,)", "(2, 2)"),
        (top_k, "token_ids", torch.zeros(6, dtype=torch.int32), "torch.int64", "torch.int32"),
        (top_k, "token_ids", torch.zeros(6, 1, dtype=torch.int64), "(6,)", "(6, 1)"),
        (top_k, "logprobs", torch.zeros(5), "(6,)", "(5,)"),
        (top_k, "logprobs", torch.zeros(6).double(), "torch.float32", "torch.float64"),
        (top_k, "logprobs", torch.zeros(6).bfloat16(), "torch.float32", "torch.bfloat16"),
        (top_k, "tail_logprob", torch.zeros(2), "(3,)", "(2,)"),
        (top_k, "tail_logprob", torch.zeros(3, 1), "(3,)", "(3, 1)"),
        (top_k, "realized_logprob", torch.zeros(4), "(3,)", "(4,)"),
        (top_k, "entropy", torch.zeros(3).half(), "torch.float32", "torch.float16"),
        (top_k, "log_z", torch.zeros(()), "(3,)", "()"),
        (dense, "logprobs", torch.zeros(3, 5), "(3, 4)", "(3, 5)"),
        (dense, "logprobs", torch.zeros(3), "(3, 4)", "(3,)"),
        (dense, "logprobs", torch.zeros(3, 4, 1), "(3, 4)", "(3, 4, 1)"),
        (dense, "logprobs", torch.zeros(3, 4).half(), "float32 or bfloat16", "torch.float16"),
        (dense, "log_z", torch.zeros(2), "(3,)", "(2,)"),
        (dense, "log_z", torch.zeros(3).double(), "torch.float32", "torch.float64"),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused_by_name(make, name, value, allowed, got):
    with pytest.raises(ValueError, match=f"^{name} must be ") as raised:
        make(**{name: value})
    message, _, was = str(raised.value).partition("got ")
    assert allowed in message
    assert got in was


def test_splits_need_at_least_one_element():
    with pytest.raises(ValueError, match=r"R\+1 elements, got none"):
        top_k(row_splits=torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (top_k, {"vocab_size": 0}),
        (dense, {"vocab_size": 0, "logprobs": torch.zeros(3, 0)}),
        (top_k, {"temperature": 0.0}),
        (dense, {"temperature": -1.0}),
        (dense, {"temperature": math.nan}),
        (dense, {"temperature": math.inf}),
        (top_k, {"vocab_size": 2**31}),
    ],
)
def test_vocabulary_and_temperature_are_positive_and_finite(make, changed):
    wanted = {"vocab_size": make().vocab_size, "temperature": 1.0, **changed}
    message = (
        "vocab_size and temperature must be positive and finite, got "
        f"{wanted['vocab_size']} and {wanted['temperature']}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**changed)


@pytest.mark.parametrize(
    ("make", "name"), [(top_k, "row_splits"), (top_k, "token_ids"), (dense, "logprobs")]
)
def test_a_tensor_without_dimensions_is_a_value_error_too(make, name):
    value = torch.tensor(0.0 if name == "logprobs" else 0)
    with pytest.raises(ValueError, match=name):
        make(**{name: value})


@EACH
def test_targets_without_rows_are_targets(make):
    empty = make()[:0]
    assert len(empty) == 0
    assert empty.to_dense().shape == (0, empty.vocab_size)
    assert same(Targets.cat([empty, make(), empty]), make())
    assert repr(empty).startswith(f"{type(empty).__name__}(0 rows")


def test_to_dense_of_draws_is_counts_over_draws():
    expected = [[0.75, 0, 0, 0, 0.25], [0, 0, 1, 0, 0], [0, 0.125, 0.5, 0.375, 0]]
    assert sampled().to_dense().tolist() == expected


def test_cat_refuses_different_numbers_of_draws():
    with pytest.raises(ValueError, match="different num_draws: 8, 9"):
        Targets.cat([sampled(), sampled(num_draws=9)])


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"num_draws": 0}, "num_draws must be 1 to 65536, got 0"),
        ({"num_draws": 65_537}, "got 65537"),
        ({"counts": torch.ones(6)}, "counts must be torch.int64"),
        ({"counts": torch.ones(5, dtype=torch.int64)}, r"of shape \(6,\)"),
    ],
)
def test_draws_that_do_not_fit_are_refused(changed, why):
    with pytest.raises(ValueError, match=why):
        sampled(**changed)
