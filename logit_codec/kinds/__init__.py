"""Registers the kinds of target: everything about a kind is found from here.

To add a kind, write its file beside the others and add its KIND to the table below.
"""

from typing import Any

from logit_codec.kinds import dense, features, given_ids, hidden, realized, sampled, top_k
from logit_codec.kinds.base import FullCells, Kind, SparseCells
from logit_codec.targets import Targets

_TABLE: tuple[Kind[Any], ...] = (
    sampled.KIND,
    top_k.KIND,
    given_ids.KIND,
    realized.KIND,
    hidden.KIND,
    features.KIND,
    dense.KIND,
)
_BY_NAME = {kind.name: kind for kind in _TABLE}
_BY_NUMBER = {kind.number: kind for kind in _TABLE}

KINDS = tuple(_BY_NAME)
"""The kinds of target that this version selects, encodes and decodes."""


def kind_named(name: str) -> Kind[Any]:
    """Returns the kind of this name. Raises KeyError."""
    return _BY_NAME[name]


def kind_numbered(number: int) -> Kind[Any] | None:
    """Returns the kind with this number in the header of a container, if there is one."""
    return _BY_NUMBER.get(number)


def cells_of(targets: Targets) -> SparseCells[Any] | FullCells[Any]:
    """Returns how targets enter a loss. Raises KeyError for a kind that no loss can use."""
    cells = _BY_NAME[targets.kind].cells
    if cells is None:
        raise KeyError(targets.kind)
    return cells(targets)
