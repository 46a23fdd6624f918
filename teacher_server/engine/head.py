"""Turns hidden states into what was asked for, through the vocabulary head in chunks of rows.

Letters: T tokens of a pack, R wanted rows of a group, C rows of one chunk, D hidden size,
V vocabulary.

The (R, V) matrix of logits never exists: a chunk is projected into a buffer, selected from, and
overwritten by the next. Nothing here waits for the device. On a GPU all chunks have C rows. On a CPU
products are made in tiles (products.py), and a chunk ends where the tiles of one size do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logit_codec import Selection, Targets, TargetSpec, select_rows
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.device import Device
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.products import LARGE, SMALL

MIN_TILE = 32
"""Products of fewer rows round differently."""
MAX_CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRows:
    """Holds what was selected of the rows of one sequence: slices of some chunks, in row order."""

    pieces: tuple[tuple[Selection, slice], ...]

    def compact(self) -> Targets:
        """Makes targets of them, on the CPU."""
        return Selection.cat([selection[rows] for selection, rows in self.pieces]).compact()


@dataclass(frozen=True, slots=True)
class _Places:
    """Says which rows of a group, in the order in which they are projected, belong to a request."""

    member: int
    slices: tuple[slice, ...]


class VocabularyHead:
    """Projects hidden states to selections with bounded memory.

    Extra memory is at most a quarter of a chunk, beside the chunk itself: C * V numbers of the
    model's dtype. chunk_nbytes is its size; above 32 MiB glibc returns a buffer at once, smaller ones
    pile up between the targets that are kept.
    """

    def __init__(
        self, model: TeacherModel, device: Device, *, chunk_nbytes: int = 128 << 20
    ) -> None:
        self.model = model
        self._device = device
        self._is_tiled = device.device.type == "cpu"
        fitting = max(MIN_TILE, chunk_nbytes // (model.vocab_size * model.dtype.itemsize))
        # A power of two, so that chunks of any size are whole numbers of tiles.
        self.chunk_rows = min(1 << (fitting.bit_length() - 1), MAX_CHUNK_ROWS)
        self.large = min(LARGE // 2, self.chunk_rows) if self._is_tiled else self.chunk_rows
        self.small = min(SMALL, self.chunk_rows) if self._is_tiled else self.chunk_rows

    @torch.inference_mode()
    def select(
        self,
        hidden_TD: Tensor,
        requests: Sequence[RowRequest],
        members: Sequence[int],
        starts: Sequence[int],
    ) -> list["SelectedGroup"]:
        """Selects the rows of the requests `members`, whose sequences begin at rows `starts`.

        Rows of different sequences share chunks if they ask for the same targets.
        """
        groups: dict[tuple[TargetSpec, float], list[tuple[int, int]]] = {}
        for member, start in zip(members, starts, strict=True):
            request = requests[member]
            groups.setdefault((request.spec, request.temperature), []).append((member, start))
        buffer_CV = hidden_TD.new_empty(self.chunk_rows, self.model.vocab_size)
        selected = []
        for (spec, temperature), group in groups.items():
            order = _Order.of(requests, group, self.large, self.small)
            rows = order.rows.upload(self._device)
            chunks = [
                self._select_chunk(hidden_TD, buffer_CV, rows[some], tile, spec, temperature)
                for some, tile in order.chunks(self.chunk_rows)
            ]
            selected.append(SelectedGroup(order, chunks))
        return selected

    def download(self, groups: Sequence["SelectedGroup"]) -> dict[int, ScoredRows]:
        """Copies what was selected to the host, and divides it among the requests, by number.

        Not to be read before the device has passed the next event.
        """
        scored: dict[int, ScoredRows] = {}
        for group in groups:
            order = group.order
            chunks = [self._device.download(chunk) for chunk in group.chunks]
            for places in order.places:
                pieces = [
                    (chunks[number], rows)
                    for whole in places.slices
                    for number, rows in order.split(whole, self.chunk_rows)
                ]
                scored[places.member] = ScoredRows(tuple(pieces))
        return scored

    def _select_chunk(
        self,
        hidden_TD: Tensor,
        buffer_CV: Tensor,
        rows: "_Rows",
        tile: int,
        spec: TargetSpec,
        temperature: float,
    ) -> Selection:
        """Projects some rows and selects from them."""
        hidden_CD = hidden_TD.index_select(0, rows.index)
        logits_CV = buffer_CV[: len(hidden_CD)]
        self.model.logits_into(hidden_CD, logits_CV, tile)
        logits_CV[:, self.model.effective_vocab_size :] = -torch.inf
        return select_rows(
            logits_CV,
            spec,
            temperature=temperature,
            uniforms=rows.uniforms,
            realized_ids=rows.realized_ids,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Holds what is known of rows before they are projected."""

    index: Tensor
    """(R,) int64: rows of the pack."""
    realized_ids: Tensor
    """(R,) int64: the tokens that really came next."""
    uniforms: Tensor | None
    """(R,) float64, for a spec that draws."""

    def __getitem__(self, rows: slice) -> "_Rows":
        uniforms = None if self.uniforms is None else self.uniforms[rows]
        return _Rows(self.index[rows], self.realized_ids[rows], uniforms)

    def upload(self, device: Device) -> "_Rows":
        return _Rows(
            device.upload(self.index),
            device.upload(self.realized_ids),
            None if self.uniforms is None else device.upload(self.uniforms),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """Orders the rows of a group: first those in large tiles, then those in small ones.

    Each part is filled up to whole tiles.
    """

    rows: _Rows
    num_large: int
    places: tuple[_Places, ...]
    large: int
    small: int

    @classmethod
    def of(
        cls,
        requests: Sequence[RowRequest],
        group: Sequence[tuple[int, int]],
        large: int,
        small: int,
    ) -> "_Order":
        whole = [len(requests[member].rows) // large * large for member, _ in group]
        parts: list[_Rows] = []
        places: list[list[slice]] = [[] for _ in group]
        at = num_large = 0
        for is_rest in (False, True):
            for number, (member, start) in enumerate(group):
                cut = slice(whole[number], None) if is_rest else slice(whole[number])
                part = _rows_of(requests[member], start)[cut]
                parts.append(part)
                if len(part.index):
                    places[number].append(slice(at, at + len(part.index)))
                    at += len(part.index)
            if not is_rest:
                num_large = at
        filler = -(at - num_large) % small
        index = torch.cat([*(part.index for part in parts), parts[0].index.new_zeros(filler)])
        realized = torch.cat([part.realized_ids for part in parts])
        drawn = [part.uniforms for part in parts if part.uniforms is not None]
        rows = _Rows(
            index,
            torch.nn.functional.pad(realized, (0, filler)),
            torch.nn.functional.pad(torch.cat(drawn), (0, filler)) if drawn else None,
        )
        found = tuple(
            _Places(member, tuple(slices))
            for (member, _), slices in zip(group, places, strict=True)
        )
        return cls(rows, num_large, found, large, small)

    def chunks(self, chunk_rows: int) -> Iterator[tuple[slice, int]]:
        """Yields the rows of each chunk, and the size of its tiles."""
        for first, last, tile in (
            (0, self.num_large, self.large),
            (self.num_large, len(self.rows.index), self.small),
        ):
            for start in range(first, last, chunk_rows):
                yield slice(start, min(start + chunk_rows, last)), tile

    def split(self, rows: slice, chunk_rows: int) -> Iterator[tuple[int, slice]]:
        """Divides rows of one part among the chunks: numbers of chunks, and rows of each."""
        is_small = rows.start >= self.num_large
        base = self.num_large if is_small else 0
        skipped = -(-self.num_large // chunk_rows) if is_small else 0
        start, stop = rows.start - base, rows.stop - base
        while start < stop:
            number, first = divmod(start, chunk_rows)
            last = min(first + stop - start, chunk_rows)
            yield skipped + number, slice(first, last)
            start += last - first


@dataclass(frozen=True, slots=True, eq=False)
class SelectedGroup:
    """Holds what was selected, on the device, for requests that ask for the same targets."""

    order: _Order
    chunks: list[Selection]


def _rows_of(request: RowRequest, start: int) -> _Rows:
    return _Rows(request.rows + start, request.token_ids[request.rows + 1], request.uniforms)
