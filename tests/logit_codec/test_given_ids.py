"""The ids that a client names: any order and shape comes in, one digest goes out."""

import struct

import pytest
import torch
import xxhash

from logit_codec import GivenIds

RECTANGLE = torch.tensor([[9, 3, -1], [10, 10, -1], [0, 2, 1]])
PAIR = (torch.tensor([0, 2, 3, 6]), torch.tensor([3, 9, 10, 2, 1, 0]))


def test_ids_in_any_order_are_sorted_and_none_comes_twice():
    for ids in (RECTANGLE, RECTANGLE.int(), RECTANGLE.tolist(), PAIR, GivenIds.of(PAIR)):
        given = GivenIds.of(ids)
        assert given.row_splits.tolist() == [0, 2, 3, 6]
        assert given.token_ids.tolist() == [3, 9, 10, 0, 1, 2]
        assert (len(given), given.most, given.sizes.tolist()) == (3, 3, [2, 1, 3])
        assert given.padded().tolist() == [[3, 9, 9], [10, 10, 10], [0, 1, 2]]
        assert given.nbytes == 8 * (4 + 6)


def test_the_digest_is_that_of_the_page():
    numbers = (2, 1, 3, 3, 9, 10, 0, 1, 2)
    expected = xxhash.xxh3_128_digest(struct.pack("<9i", *numbers))
    assert GivenIds.of(RECTANGLE).digest() == expected
    assert GivenIds.of(RECTANGLE)[1:].digest() == GivenIds.of(RECTANGLE[1:]).digest() != expected
    # The same ids in other rows are others.
    moved = (torch.tensor([0, 1, 3, 6]), torch.tensor([3, 9, 10, 0, 1, 2]))
    assert GivenIds.of(moved).digest() != expected


def test_slices_are_those_of_a_list():
    given, rows = GivenIds.of(RECTANGLE), [[3, 9], [10], [0, 1, 2]]
    for start in range(-4, 5):
        for stop in range(-4, 5):
            part = given[start:stop]
            ids = part.token_ids.split(part.sizes.tolist()) if len(part) else []
            assert [row.tolist() for row in ids] == rows[start:stop]
    with pytest.raises(ValueError, match="steps of 1, got 2"):
        given[::2]


def test_no_rows_are_given_ids_too():
    for ids in (
        torch.zeros(0, 3, dtype=torch.int64),
        (torch.zeros(1).long(), torch.zeros(0).long()),
    ):
        given = GivenIds.of(ids)
        assert (len(given), given.most, given.padded().shape) == (0, 0, (0, 1))
        assert given.digest() == xxhash.xxh3_128_digest(b"")


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\(rows, ids per row\), got shape \(3,\)"),
        (torch.zeros(3, 1), "whole numbers, got torch.float32"),
        (torch.zeros(3, 1, dtype=torch.bool), "whole numbers, got torch.bool"),
        (torch.tensor([[0], [-2]]), "0 to 2147483647, or -1 to fill a row up; got -2"),
        (torch.tensor([[0], [2**31]]), "0 to 2147483647, or -1 to fill a row up; got 2147483648"),
        (torch.tensor([[0], [-1]]), "row 1 names no id; every row needs at least one"),
        (torch.zeros(2, 0, dtype=torch.int64), "row 0 names no id"),
        ((PAIR[0], -PAIR[1]), "given ids are 0 to 2147483647; got -10"),
        ((PAIR[0][:-1], PAIR[1]), r"ascend from 0 .* got shapes \(3,\) and \(6,\)"),
        ((PAIR[0] + 1, PAIR[1]), "ascend from 0"),
        ((torch.tensor([0, 4, 3, 6]), PAIR[1]), "ascend from 0"),
        ((torch.zeros(0).long(), torch.zeros(0).long()), "ascend from 0"),
        ((torch.tensor([0, 0, 6]), PAIR[1]), "row 0 names no id"),
    ],
)
def test_what_names_no_ids_is_refused(ids, why):
    with pytest.raises(ValueError, match=why):
        GivenIds.of(ids)
