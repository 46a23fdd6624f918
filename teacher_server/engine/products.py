"""Multiplies in tiles of fixed size, so that a row's bits do not depend on the rows beside it.

Letters: T rows of a pack, D columns of the input, N columns of the output.

A matrix product of another number of rows may add up in another order: in bfloat16 nearly always,
in float32 with several threads (docs/log.md). On a GPU a pack always has the same number of rows.
On a CPU that would waste time that nobody else uses, so there every product is made of tiles
instead. Which tile computes a row depends on the row's place in its own sequence alone: as many
tiles of LARGE rows as fit into the sequence, and what is left over in tiles of SMALL rows, which it
shares with what is left of its neighbours.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LARGE, SMALL = 512, 128
"""Rows of a tile: in float32 a product of 512 rows costs 10 to 25 % more per row than one of 2,048, one
of 128 rows 10 to 60 % (docs/log.md, `python -m benchmarks.engine --tiles`)."""
OPERATORS = ("gemm_4bit.default",)
"""Names of products of rows with quantised weights that packages register with torch."""
ALIGNMENT = 64
"""Bytes; the same product may round differently where its memory begins elsewhere."""


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """Divides the rows of a pack into tiles.

    The model runs with the rows in the order of the tiles, first all that are in large ones, so that
    no product has to gather its rows. All that a model computes beside attention is done row by row.
    """

    num_large: int
    """Rows in large tiles, a multiple of `large`."""
    num_rows: int
    large_seqlens: Tensor
    """(N+1,) int32: where the rows of each sequence begin that are in large tiles, and the end."""
    small_seqlens: Tensor
    """(N+1,) int32: where its other rows begin, and the end."""
    order: Tensor | None
    """(T,) int64: rows of the pack in the order of the tiles; None if that is their own."""
    places: Tensor | None
    """(T,) int64: the place of each row of the pack in that order."""
    large: int
    small: int

    @classmethod
    def of(cls, lengths: Sequence[int], large: int = LARGE, small: int = SMALL) -> Self:
        """Tiles rows that stand back to back, those of each sequence on their own.

        Raises ValueError if they do not fill whole tiles.
        """
        num_rows = sum(lengths)
        if num_rows % small or large % small:
            raise ValueError(f"{num_rows} rows are not whole tiles of {small} and {large}")
        large_N = [length // large * large for length in lengths]
        small_N = [length - whole for length, whole in zip(lengths, large_N, strict=True)]
        num_large = sum(large_N)
        order = places = None
        if 0 < num_large < num_rows:
            starts = itertools.accumulate(lengths, initial=0)
            cuts = [(start, start + whole) for start, whole in zip(starts, large_N, strict=False)]
            in_large = [torch.arange(start, cut) for start, cut in cuts]
            in_small = [
                torch.arange(cut, cut + rest) for (_, cut), rest in zip(cuts, small_N, strict=True)
            ]
            order = torch.cat([*in_large, *in_small])
            places = order.argsort()
        return cls(
            num_large=num_large,
            num_rows=num_rows,
            large_seqlens=_bounds(large_N, 0),
            small_seqlens=_bounds(small_N, num_large),
            order=order,
            places=places,
            large=large,
            small=small,
        )

    def to_tiles(self, rows: Tensor) -> Tensor:
        """Puts the rows of the pack into the order of the tiles."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def from_tiles(self, rows: Tensor) -> Tensor:
        """Undoes `to_tiles`."""
        return rows if self.places is None else rows.index_select(0, self.places)

    def multiply(
        self, rows_TD: Tensor, weight_DN: Tensor, bias: Tensor | None, out_TN: Tensor
    ) -> None:
        """Writes rows_TD @ weight_DN + bias to `out_TN`; the rows are in the order of the tiles."""
        for tile in self.tiles():
            _multiply(rows_TD[tile], weight_DN, bias, out_TN[tile])

    def tiles(self) -> Iterator[slice]:
        """Yields the rows of each tile, in the order of the tiles."""
        for first, last, size in (
            (0, self.num_large, self.large),
            (self.num_large, self.num_rows, self.small),
        ):
            for start in range(first, last, size):
                yield slice(start, start + size)


def _bounds(lengths: Sequence[int], first: int) -> Tensor:
    """Where rows of these lengths begin that stand back to back from `first`, and the end."""
    return torch.tensor([*itertools.accumulate(lengths, initial=first)], dtype=torch.int32)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is what torch itself multiplies, and no quantised or sharded one."""
    return type(weight) in (Tensor, nn.Parameter)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether its memory begins where products on a CPU do not depend on it."""
    return tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0


def _multiply(rows_CD: Tensor, weight_DN: Tensor, bias: Tensor | None, out_CN: Tensor) -> None:
    if not _is_aligned(rows_CD):
        rows_CD = rows_CD.clone()
    into = out_CN if _is_aligned(out_CN) else torch.empty_like(out_CN)
    if bias is None:
        torch.mm(rows_CD, weight_DN, out=into)
    else:
        torch.addmm(bias, rows_CD, weight_DN, out=into)
    if into is not out_CN:
        out_CN.copy_(into)


class TiledProducts(TorchFunctionMode):
    """Makes the products of the model that runs inside of it tile by tile.

    Linear layers call `F.linear`, GPT-2's call `torch.addmm`, those of bitsandbytes an operator of its
    own. Quantised weights multiply each tile in their own way. A model with other products of whole
    rows fails the probe of exactness and is served at level `tolerance`.
    """

    def __init__(self, tiling: Tiling) -> None:
        super().__init__()
        self._tiling = tiling

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        if func is torch.addmm and not kwargs and len(args) == 3:
            bias, rows, weight = args
            if len(rows) == self._tiling.num_rows:
                return self._tile(rows, weight, bias)
        if getattr(func, "__name__", "") in OPERATORS and not self._is_other(args[0]):
            rows, *rest = args
            return self._tile_by(lambda tile: func(tile, *rest, **(kwargs or {})), rows)
        return func(*args, **(kwargs or {}))

    def _is_other(self, input: Tensor) -> bool:
        """Whether an input has other rows than those of the pack: an expert's, for example."""
        return input.numel() != self._tiling.num_rows * input.shape[-1]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._is_other(input):
            return F.linear(input, weight, bias)
        if not is_plain(weight):
            return self._tile_by(lambda tile: F.linear(tile, weight, bias), input)
        rows = input.reshape(-1, input.shape[-1])
        return self._tile(rows, weight.t(), bias).view(*input.shape[:-1], -1)

    def _tile(self, rows_TD: Tensor, weight_DN: Tensor, bias: Tensor | None) -> Tensor:
        out_TN = rows_TD.new_empty(len(rows_TD), weight_DN.shape[1])
        self._tiling.multiply(rows_TD, weight_DN, bias, out_TN)
        return out_TN

    def _tile_by(self, multiply: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        rows_TD = input.reshape(-1, input.shape[-1])
        tiles = [rows_TD[tile] for tile in self._tiling.tiles()]
        products = [multiply(tile if _is_aligned(tile) else tile.clone()) for tile in tiles]
        return torch.cat(products).view(*input.shape[:-1], -1)


class InPlaceHead(TorchFunctionMode):
    """Makes a head write its (C, V) logits to one buffer, and change them there.

    Models scale, cap and shift their logits in steps that each allocate as much again as the logits
    take (Gemma 2: three times). The arithmetic of each step is the model's own.
    """

    IN_PLACE: ClassVar[dict[str, Any]] = {
        "div": torch.div,
        "true_divide": torch.div,
        "__truediv__": torch.div,
        "mul": torch.mul,
        "multiply": torch.mul,
        "__mul__": torch.mul,
        "tanh": torch.tanh,
    }

    def __init__(self, buffer: Tensor, tile: int) -> None:
        """tile: rows of a product."""
        super().__init__()
        self._buffer = buffer
        self._tile = tile

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        change = self.IN_PLACE.get(getattr(func, "__name__", ""))
        if change is not None and not kwargs and self._is_logits(args):
            return change(*args, out=args[0])
        return func(*args, **kwargs)

    def _is_logits(self, args: tuple) -> bool:
        first = args[0]
        return (
            isinstance(first, Tensor)
            and first.untyped_storage()._cdata == self._buffer.untyped_storage()._cdata
            and first.storage_offset() == self._buffer.storage_offset()
            and first.dtype == self._buffer.dtype
            and first.numel() == self._buffer.numel()
            and all(isinstance(other, int | float) for other in args[1:])
        )

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if (len(rows), len(weight)) != tuple(self._buffer.shape):
            return F.linear(input, weight, bias)
        for first in range(0, len(rows), self._tile):
            tile = slice(first, first + self._tile)
            _multiply(rows[tile], weight.t(), bias, self._buffer[tile])
        return self._buffer.view(*input.shape[:-1], -1)
