"""Scores batches of sequences: launches packs on a device, and waits for what they give.

`launch` lays sequences out, queues the forward pass, the head and the copies, and returns at once on
a GPU; `result` waits. Whoever calls them from two threads keeps the device busy: one pack computes
while the next is laid out.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from logit_codec import Targets
from logitstream.logs import first_line
from teacher_server.engine.batch import PackTimes, RowRequest
from teacher_server.engine.device import Device, Event, open_device
from teacher_server.engine.generate import Generator, describe_shape
from teacher_server.engine.head import ScoredRows, States, VocabularyHead
from teacher_server.engine.layers import watch_layers
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.orders import Followers, LostStep, OpenGeneration, Order, Score
from teacher_server.engine.packing import ROW_MULTIPLE, Pack, Packer
from teacher_server.engine.products import LARGE, SMALL

PACK_TOKENS = {"cpu": 4096, "cuda": 8192}
"""Tokens of a pack where nothing else is asked for."""

Marks = tuple[Event, Event, Event, Event]
"""The start of a pack, and the ends of its forward pass, of its head, and of its copies."""


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """Holds work that the device has been given, until its result is asked for."""

    rows: tuple[ScoredRows, ...]
    """In the order of the requests; not to be read before `done`."""
    events: tuple[Marks, ...]
    """Of each pack."""
    fill_s: float
    launch_s: float


class Engine:
    """Runs one teacher on one device.

    chunk_nbytes: size of a chunk of logits. pack_tokens: T, tokens of a pack; on a GPU, and for an
    architecture that cannot pack, no sequence may be longer. exact: level `bytes`, the same bytes
    whatever else is in a pack; without it (`tolerance`) products are made in one piece on a CPU, and
    underfull packs shrink on a GPU. device: how work is queued. followers: the other ranks of a
    divided teacher.
    """

    def __init__(
        self,
        model: TeacherModel,
        *,
        chunk_nbytes: int = 128 << 20,
        pack_tokens: int | None = None,
        exact: bool = True,
        device: Device | None = None,
        followers: Followers | None = None,
    ) -> None:
        self.exact = exact
        self._followers = followers
        self.device = device or open_device(model.device)
        kind = model.device.type
        self.pack_tokens = pack_tokens or PACK_TOKENS.get(kind, PACK_TOKENS["cuda"])
        self.packer = Packer(
            kind,
            pack_tokens=self.pack_tokens,
            exact=exact,
            divide_at=model.max_shared_positions,
        )
        self._head = VocabularyHead(model, self.device, chunk_nbytes=chunk_nbytes)
        longest = model.max_sequence_tokens
        if self.packer.is_fixed:
            longest = min(longest, self.pack_tokens)
        self.model = replace(
            model, max_sequence_tokens=longest, shape=self._describe_shape(model, exact)
        )
        """With what this engine adds to its fingerprint, and its limit of a sequence."""
        self._launching = threading.Lock()
        """A model's attention is changed for the time of a launch, and put back."""

    @property
    def min_pack_tokens(self) -> int:
        """Up to so many tokens a pack takes as long as one of fewer."""
        return self.pack_tokens if self.packer.is_fixed else SMALL

    def _describe_shape(self, model: TeacherModel, exact: bool) -> dict[str, Any]:
        """Returns the sizes that the bytes of an answer depend on."""
        tiles = (LARGE, SMALL) if exact and not self.packer.is_fixed else None
        return {
            "packed": model.is_packed,
            "texts": describe_shape(model.device.type),
            # Sums between devices are rounded, and another number of them is summed otherwise.
            "vocabulary": None if model.part is None else model.part.bounds,
            "packs": self.packer.shapes,
            "level": "bytes" if exact else "tolerance",
            "tiles": tiles,
            "row_multiple": ROW_MULTIPLE,
            "head": (self._head.chunk_rows, self._head.large, self._head.small),
            # An architecture that cannot pack pads sequences to lengths that this limit cuts.
            "max_sequence_tokens": None if model.is_packed else model.max_sequence_tokens,
        }

    def open_generation(self, pool_nbytes: int) -> Generator:
        """Returns what writes texts, with a pool of keys of at most this size.

        Raises CannotGenerate, and ValueError if the pool holds no page.
        """
        with self._launching, self.device.queue():
            self._tell(OpenGeneration(pool_nbytes))
            return Generator(
                self.model,
                self.device,
                pool_nbytes,
                exact=self.exact,
                followers=self._followers,
            )

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Makes a context in which a generator may launch: nothing else is launched meanwhile.

        Where there are followers, it raises LostStep for whatever is raised inside: they have begun
        what this rank has not finished.
        """
        with self._launching, self.device.queue():
            try:
                yield
            except Exception as error:
                if self._followers is None or isinstance(error, LostStep):
                    raise
                raise LostStep(f"{type(error).__name__}: {first_line(error)}") from error

    def _tell(self, order: Order) -> None:
        if self._followers is not None:
            self._followers.tell(order)

    @torch.inference_mode()
    def launch(self, requests: Sequence[RowRequest]) -> Launched:
        """Queues the scoring of some sequences. Does not wait for a GPU; a CPU computes here."""
        rows: dict[int, ScoredRows] = {}
        events: list[Marks] = []
        fill_s = 0.0
        with self.launching():
            began = time.perf_counter()
            if self._followers is not None:
                self._tell(Score.of(requests))
            if self.model.is_packed:
                packs = self.packer.pack(requests)
                fill_s = time.perf_counter() - began
                for pack in packs:
                    scored, marks = self._launch_pack(pack, requests)
                    rows |= scored
                    events.append(marks)
            else:
                for members in self._by_canonical_length(requests):
                    scored, marks = self._launch_padded(members, requests)
                    rows |= scored
                    events.append(marks)
        return Launched(
            rows=tuple(rows[index] for index in range(len(requests))),
            events=tuple(events),
            fill_s=fill_s,
            launch_s=time.perf_counter() - began - fill_s,
        )

    def result(self, launched: Launched) -> tuple[tuple[ScoredRows, ...], PackTimes]:
        """Waits until the device is done. Raises the device's error."""
        began = time.perf_counter()
        for *_, done in launched.events:
            done.synchronize()
        wait_s = time.perf_counter() - began
        between = self.device.seconds_between
        times = PackTimes(
            fill_s=launched.fill_s,
            launch_s=launched.launch_s,
            wait_s=wait_s,
            forward_s=sum(between(start, forwarded) for start, forwarded, _, _ in launched.events),
            head_s=sum(
                between(forwarded, selected) for _, forwarded, selected, _ in launched.events
            ),
            copy_s=sum(between(selected, done) for *_, selected, done in launched.events),
        )
        return launched.rows, times

    def score(self, requests: Sequence[RowRequest]) -> list[Targets]:
        """Returns the targets of some sequences, in order; waits for them."""
        rows, _ = self.result(self.launch(requests))
        return [one.compact() for one in rows]

    def _launch_pack(
        self, pack: Pack, requests: Sequence[RowRequest]
    ) -> tuple[dict[int, ScoredRows], Marks]:
        """Queues the scoring of one pack."""
        upload = self.device.upload
        start = self.device.mark()
        with watch_layers(self.model.causal_lm, _layers_of(requests, pack.members)) as by_layer:
            hidden_TD = self.model.hidden_states(
                upload(pack.token_ids), upload(pack.positions), upload(pack.cu_seqlens), pack
            )
        if pack.tiling is not None:
            by_layer = {layer: pack.tiling.from_tiles(state) for layer, state in by_layer.items()}
        states = States(hidden_TD, by_layer)
        forwarded = self.device.mark()
        return self._launch_head(states, requests, pack.members, pack.starts, start, forwarded)

    def _launch_padded(
        self, members: Sequence[int], requests: Sequence[RowRequest]
    ) -> tuple[dict[int, ScoredRows], Marks]:
        """Queues the scoring of sequences of one canonical length."""
        start = self.device.mark()
        with watch_layers(self.model.causal_lm, _layers_of(requests, members)) as by_layer:
            hidden_BLD = self.model.padded_hidden_states(
                [requests[index].token_ids for index in members]
            )
        states = States(hidden_BLD.flatten(0, 1), by_layer)
        forwarded = self.device.mark()
        num_tokens = len(states.hidden_TD)
        starts = range(0, num_tokens, num_tokens // len(members))
        return self._launch_head(states, requests, members, starts, start, forwarded)

    def _launch_head(
        self,
        states: States,
        requests: Sequence[RowRequest],
        members: Sequence[int],
        starts: Sequence[int],
        start: Event,
        forwarded: Event,
    ) -> tuple[dict[int, ScoredRows], Marks]:
        """Queues the head, the selection and the copies."""
        groups = self._head.select(states, requests, members, starts)
        selected = self.device.mark()
        rows = self._head.download(groups)
        return rows, (start, forwarded, selected, self.device.mark())

    def _by_canonical_length(self, requests: Sequence[RowRequest]) -> list[list[int]]:
        """Groups requests that share a forward pass.

        At level `bytes` each runs alone: products round differently with each sequence more.
        """
        if self.exact:
            return [[index] for index in range(len(requests))]
        groups: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            length = self.model.bucket_length(len(request.token_ids))
            groups.setdefault(length, []).append(index)
        return list(groups.values())


def _layers_of(requests: Sequence[RowRequest], members: Sequence[int]) -> tuple[int, ...]:
    """Returns the layers whose states any of the requests asks for."""
    return tuple(sorted({n for index in members for n in requests[index].spec.feature_layers}))
