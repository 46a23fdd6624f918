"""Turns hidden states into what was asked for, through the vocabulary head in chunks of rows.

Letters: T tokens of a pack, R wanted rows of a group, C rows of one chunk, D hidden size,
V vocabulary.

The (R, V) matrix of logits never exists: a chunk is projected into a buffer, selected from, and
overwritten by the next. Nothing here waits for the device. On a GPU all chunks have C rows. On a CPU
products are made in tiles (products.py), and a chunk ends where the tiles of one size do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from logit_codec import RowInputs, Selection, Targets, TargetSpec, select_rows
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
        states: "States",
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
        part = self.model.part
        num_columns = self.model.vocab_size if part is None else part.num_ids
        buffer_CV = states.hidden_TD.new_empty(self.chunk_rows, num_columns)
        selected = []
        for (spec, temperature), group in groups.items():
            order = _Order.of(requests, group, self.large, self.small)
            rows = order.rows.upload(self._device)
            chunks = [
                self._select_chunk(states, buffer_CV, rows[some], tile, spec, temperature)
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
        states: "States",
        buffer_CV: Tensor,
        rows: "_Rows",
        tile: int,
        spec: TargetSpec,
        temperature: float,
    ) -> Selection:
        """Projects some rows, unless the spec needs no logits of them, and selects from them."""
        hidden_CD = states.hidden_TD.index_select(0, rows.index)
        logits_CV = buffer_CV[: len(hidden_CD)]
        if spec.reads_logits:
            self.model.logits_into(hidden_CD, logits_CV, tile)
        inputs = rows.inputs
        if spec.needs_hidden:
            inputs = replace(inputs, hidden=hidden_CD)
        if spec.feature_layers:
            inputs = replace(inputs, features=states.features(spec.feature_layers, rows.index))
        return select_rows(
            logits_CV, spec, temperature=temperature, part=self.model.part, **inputs.tensors()
        )


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Holds the states of all tokens of a pack, on the device."""

    hidden_TD: Tensor
    """What the vocabulary head reads."""
    by_layer: dict[int, Tensor] = field(default_factory=dict)
    """(T, D) states after the layers that anybody asked for."""

    def features(self, layers: tuple[int, ...], index: Tensor) -> Tensor:
        """Returns (C, layers, D) states of some rows, as bfloat16."""
        # What comes out of all layers has gone through the final norm, and is what the head reads.
        states = [self.by_layer.get(layer, self.hidden_TD) for layer in layers]
        rows = [state.index_select(0, index) for state in states]
        return torch.stack([row.to(torch.bfloat16) for row in rows], 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Holds what is known of rows before they are projected."""

    index: Tensor
    """(R,) int64: rows of the pack."""
    inputs: RowInputs
    """What a selection reads of them, as far as the requests say it."""

    def __getitem__(self, rows: slice) -> "_Rows":
        return _Rows(self.index[rows], self.inputs[rows])

    def upload(self, device: Device) -> "_Rows":
        uploaded = {name: device.upload(value) for name, value in self.inputs.tensors().items()}
        return _Rows(device.upload(self.index), RowInputs(**uploaded))

    @staticmethod
    def cat(parts: Sequence["_Rows"], filler: int) -> "_Rows":
        """Joins parts of requests for the same targets, and appends `filler` rows of zeros."""
        tensors: dict[str, Tensor] = {}
        for name, first in parts[0].inputs.tensors().items():
            joined = torch.cat([part.inputs.tensors()[name] for part in parts])
            rows = first.new_zeros(filler, *first.shape[1:])
            tensors[name] = torch.cat([joined, rows]) if filler else joined
        index = torch.cat([*(part.index for part in parts), parts[0].index.new_zeros(filler)])
        return _Rows(index, RowInputs(**tensors))


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
        rows = _Rows.cat(parts, filler)
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
    inputs = RowInputs(
        realized_ids=request.token_ids[request.rows + 1],
        uniforms=request.uniforms,
        given_ids=request.given_ids,
    )
    return _Rows(request.rows + start, inputs)
