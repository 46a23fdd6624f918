"""Collects new rows in memory, and seals them in shards of a sensible size."""

import logging
import time
from collections.abc import Sequence

import numpy as np

from logit_codec import IdTable
from protos import teacher_pb2
from student_trainer.errors import RecordError
from student_trainer.record.catalog import Catalog
from student_trainer.record.folder import id_table_file
from student_trainer.record.index import Entry
from student_trainer.record.provenance import Provenance
from student_trainer.record.request import Request
from student_trainer.record.schema import Row
from student_trainer.record.writer import Writer

logger = logging.getLogger(__name__)


class Sealer:
    """Writes a live teacher's answers to the record; called in the record's thread.

    The first error is final: a run must not train on while its record has holes.
    """

    def __init__(
        self,
        catalog: Catalog,
        info: teacher_pb2.TeacherInfo,
        id_tables: Sequence[IdTable],
        *,
        writes: bool,
        seal_nbytes: int,
        seal_s: float,
    ) -> None:
        """writes: whether to record at all; if not, answers are not kept. Nor are they added to texts
        that a teacher wrote, which are data too."""
        self._folder = catalog.folder
        self._catalog = catalog
        self._info = info
        self._id_tables = id_tables
        self._writes = writes and not catalog.written
        if writes and catalog.written:
            logger.info(
                "%s holds texts that a teacher wrote: targets of others are asked for and not added",
                catalog.folder.root,
            )
        self._seal_nbytes, self._seal_s = seal_nbytes, seal_s
        self._writer: Writer | None = None
        self._unsealed: list[tuple[Row, Entry]] = []
        self._unsealed_nbytes = 0
        self._unsealed_since_s = 0.0
        """When the first unsealed row came, in seconds of `time.monotonic`."""
        self.failure: RecordError | None = None
        """Why nothing can be written any more."""

    def keep(self, request: Request, entry: Entry, payloads: tuple[bytes, ...]) -> None:
        """Keeps an answer, and seals what there is if it is enough. Raises RecordError."""
        if not self._writes:
            self._catalog.remove(request.key, entry)
            return
        if self._writer is None:  # made late, so that a record that only replays writes nothing
            self._writer = self._open_writer()
        ids = request.piece.token_ids.numpy().astype(np.int32)
        row = Row(request.key, entry.seed, entry.epoch, entry.row_mask, ids, payloads)
        if not self._unsealed:
            self._unsealed_since_s = time.monotonic()
        self._unsealed.append((row, entry))
        self._unsealed_nbytes += row.nbytes
        # From here on other requests get the answer from memory, and cancelling this one does not
        # remove the entry.
        self._catalog.mark_received(entry, payloads)
        waited_s = time.monotonic() - self._unsealed_since_s
        if self._unsealed_nbytes >= self._seal_nbytes or waited_s >= self._seal_s:
            self.seal()

    def seal(self) -> None:
        """Writes the unsealed rows to a shard. Raises RecordError, and then always the same."""
        if not self._unsealed:
            return
        if self.failure is not None:
            raise self.failure
        assert self._writer is not None
        try:
            shard = self._writer.seal([row for row, _ in self._unsealed])
        except RecordError as error:
            self.failure = error
            raise
        # Only now, with the shard in its place, may readers be sent there.
        self._catalog.mark_sealed(shard, (entry for _, entry in self._unsealed))
        self._unsealed, self._unsealed_nbytes = [], 0

    def seal_rest(self) -> None:
        """Seals what is left when the record is closed, unless an error was raised before."""
        if self.failure is None:
            self.seal()

    def _open_writer(self) -> Writer:
        recorded = self._catalog.provenance
        assert recorded is not None
        digests = [table.digest for table in self._id_tables]
        # The teacher that answers now: another release of torch may have begun the record.
        provenance = Provenance.of(self._info, recorded.spec, recorded.temperature, digests)
        try:
            for table in self._id_tables:  # a table that is there already gets the same bytes
                self._folder.put(id_table_file(table.digest.hex()), table.to_bytes())
            return Writer(self._folder, provenance, self._catalog.lost)
        except RecordError as error:
            self.failure = error
            raise
