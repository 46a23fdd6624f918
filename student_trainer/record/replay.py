"""Replays recorded targets: reads a few sequences from their shards, then decodes them."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from logit_codec import IdTable, decode_parts
from student_trainer.record.catalog import Catalog
from student_trainer.record.index import Entry
from student_trainer.record.request import RecordCounters, Request
from student_trainer.record.shards import DAMAGE, DamagedShard
from student_trainer.record.worker import Worker, begin, fail
from student_trainer.teachers.request import Answer

REPLAYED_TOGETHER = 8
"""Sequences that are read before the first of them is decoded.

Reading and decoding in turns push each other's code and data out of the caches, and take a third
longer together.
"""


class Replayer:
    """Resolves futures of recorded sequences, in the record's thread."""

    def __init__(
        self,
        catalog: Catalog,
        worker: Worker,
        id_tables: Sequence[IdTable],
        counters: RecordCounters,
        answer_otherwise: Callable[[Request, "Future[Answer]"], None],
    ) -> None:
        """answer_otherwise: resolves the future of a sequence whose shard was damaged and dropped."""
        self._catalog = catalog
        self._shards = catalog.shards
        self._worker = worker
        self._id_tables = id_tables
        self._counters = counters
        self._answer_otherwise = answer_otherwise
        self._queue: deque[tuple[Request, Entry, Future[Answer]]] = deque()
        """Sequences to replay. The thread has at least one call of `_replay_some` to come for each;
        a call that finds nothing left does nothing."""

    def replay(self, request: Request, entry: Entry, future: "Future[Answer]") -> None:
        """Resolves the future in the record's thread, together with others that wait."""
        self._queue.append((request, entry, future))
        self._worker.run_for(future, self._replay_some)

    def read(self, request: Request, entry: Entry) -> Answer:
        """Reads one sequence now; called in the record's thread. Raises DamagedShard."""
        return self._fetch(request, entry)()

    def _replay_some(self) -> None:
        count = min(len(self._queue), REPLAYED_TOGETHER)
        waiting = [self._queue.popleft() for _ in range(count)]
        fetched = [
            (request, future, self._fetch(request, entry))
            for request, entry, future in waiting
            if not future.cancelled()
        ]
        for request, future, decode_it in fetched:
            try:
                self._resolve(request, future, decode_it)
            except BaseException as error:  # of this one; those fetched with it are still answered
                fail(future, error)

    def _resolve(
        self, request: Request, future: "Future[Answer]", decode_it: Callable[[], Answer]
    ) -> None:
        if not begin(future):
            return
        try:
            answer = decode_it()
        except DamagedShard as damaged:
            self._catalog.drop(damaged.shard)  # first, or the same entry would be found again
            self._answer_otherwise(request, future)
        else:
            future.set_result(answer)

    def _fetch(self, request: Request, entry: Entry) -> Callable[[], Answer]:
        """Reads a sequence; returns a function that decodes it, or raises what went wrong here."""
        payloads, shard = entry.payloads, entry.shard
        try:
            if not payloads:  # it is sealed
                identity = request.key, entry.seed, entry.epoch
                payloads = tuple(self._shards.payloads(shard, entry.row, identity))
        except BaseException as error:  # kept for this one's future; others are read meanwhile
            return partial(self._shards.raise_damage, shard, error)
        return partial(self._decode, request, entry.row_mask, shard, payloads)

    def _decode(
        self, request: Request, mask: bytes | None, shard: str, payloads: tuple[bytes, ...]
    ) -> Answer:
        try:
            given = request.piece.given_ids
            targets = decode_parts(payloads, id_tables=self._id_tables, given_ids=given)
        except DAMAGE as error:  # a CodecError is a ValueError
            self._shards.raise_damage(shard, error)
        piece = request.piece
        num_rows = piece.num_tokens - 1 if mask is None else _count_bits(mask)
        if targets.num_rows != num_rows:
            raise DamagedShard(shard)
        if mask is None and request.row_mask is not None and piece.rows is not None:
            targets = targets[piece.rows]
            payloads = ()  # they hold more rows than were asked for
        self._counters.replayed += 1
        return self._counters.hand_out(Answer(targets, payloads), request)


def _count_bits(mask: bytes) -> int:
    return int.from_bytes(mask, "little").bit_count()
