"""Writes the texts of a teacher to a folder, which is a record too, and knows which are there.

P: tokens of a prompt, N: tokens written after it, L = P + N.
"""

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from logit_codec import IdTable, TargetSpec, encode_parts, ids_digest
from protos import teacher_pb2
from student_trainer.errors import RecordError
from student_trainer.record.catalog import Catalog
from student_trainer.record.folder import Folder, id_table_file
from student_trainer.record.provenance import NO_TARGETS, Provenance
from student_trainer.record.request import RecordCounters
from student_trainer.record.schema import Row, Written
from student_trainer.record.shards import DAMAGE
from student_trainer.record.writer import Writer
from student_trainer.teachers.generation import GenerateOptions, Generation

SEAL_NBYTES = 64 << 20
SEAL_S = 60.0
"""As for other records: a kill loses no more than what came since then."""
PART_NBYTES = 1 << 20
GRAM = 4
"""Tokens of the runs that are looked for again in a text, as in "seq-rep-4"."""


class GeneratedSet:
    """Adds texts to a folder, in the order in which they come.

    Prompts, samples and settings may differ from text to text; teacher and targets may not. Every
    file in the folder appears whole or not at all, so that a set goes on after any interruption.
    """

    def __init__(
        self,
        folder: str,
        info: teacher_pb2.TeacherInfo,
        options: GenerateOptions,
        *,
        id_tables: Sequence[IdTable] = (),
        tokenizer: Any = None,
    ) -> None:
        """info: of the teacher. options: how all texts that are added here are written. tokenizer:
        turns ids into text.

        Raises RecordError for a folder of something else, IncompatibleTeacher, InvalidRequest.
        """
        self._folder = Folder(folder)
        self._info, self._options = info, options
        self._id_tables, self._tokenizer = id_tables, tokenizer
        self.settings = describe_settings(options)
        """How texts are written, as JSON."""
        self._spec = _complete(options.spec, info)
        self.num_added = 0
        """Texts that were added here."""
        self.num_sealed = 0
        """Of these, those that are in a shard."""
        self.num_tokens = 0
        """Tokens of these, without their prompts."""
        self.num_payload_bytes = 0
        """Of their targets."""
        self._catalog = Catalog(
            self._folder,
            RecordCounters(),
            draws=1,
            is_live=True,
            writes=True,
            verify=self._folder.is_local,
        )
        self._check()
        self._known = self._read_known()
        self._writer: Writer | None = None
        self._rows: list[Row] = []
        self._nbytes = 0
        self._since_s = time.monotonic()
        """When the time began that the unsealed rows took."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="texts")
        self._sealing: Future[None] | None = None

    def __len__(self) -> int:
        """Texts in the folder, of any settings; after `close`, all that will be in it."""
        return len(self._catalog) + self.num_sealed

    def has(self, prompt_ids: Tensor, sample: int = 0) -> bool:
        """Whether this text was written before, with the same settings."""
        return self._make_key(ids_digest(prompt_ids), sample, self.settings) in self._known

    def begin(self) -> None:
        """Makes the folder, before the first text. Raises RecordError where nothing can be written.

        The time that texts take begins now.
        """
        self._writer = self._open_writer()
        self._since_s = time.monotonic()

    def add(self, generation: Generation) -> None:
        """Adds a text, and seals what there is if it is enough. Raises RecordError."""
        row = self._make_row(generation)
        self._rows.append(row)
        self._nbytes += row.nbytes
        self.num_added += 1
        self.num_tokens += len(generation.token_ids)
        self.num_payload_bytes += sum(map(len, row.payloads))
        key = self._make_key(ids_digest(generation.prompt_ids), generation.sample, self.settings)
        self._known.add(key)
        waited_s = time.monotonic() - self._since_s
        if self._nbytes >= SEAL_NBYTES or waited_s >= SEAL_S:
            self.seal()

    def seal(self) -> None:
        """Writes the texts that are in memory to a shard. Raises RecordError."""
        if not self._rows:
            return
        now_s = time.monotonic()
        rows, seconds = self._rows, now_s - self._since_s
        self._rows, self._nbytes, self._since_s = [], 0, now_s
        # In a thread, where Ctrl-C cannot end it half way: `close` waits for it.
        self._sealing = self._thread.submit(self._write, rows, seconds)
        self._sealing.result()

    def close(self) -> None:
        """Seals what is left. Raises RecordError, and the same again if something failed before."""
        try:
            if self._sealing is not None:
                self._sealing.result()
            self.seal()
        finally:
            self._thread.shutdown()
            self._catalog.shards.close()

    def _write(self, rows: list[Row], seconds: float) -> None:
        assert self._writer is not None
        tokens = sum(len(row.token_ids) - _num_before(row) for row in rows)
        self._writer.seal(rows, tokens=tokens, seconds=round(seconds, 3))
        self.num_sealed += len(rows)

    def _check(self) -> None:
        found, root = self._catalog.provenance, self._folder.root
        if found is None:
            return
        if not self._catalog.written:
            raise RecordError(
                f"{root} is a record of other texts: give a folder of its own, --output FOLDER"
            )
        found.check_same_teacher(root, self._info)
        options = self._options
        found.check_targets(root, _spec_name(options), options.spec_temperature)

    def _read_known(self) -> set[bytes]:
        """Reads which texts are there."""
        known: set[bytes] = set()
        for name in self._catalog.written:
            try:
                table = self._catalog.shards.read(name, ["prompt_key", "sample", "settings"])
            except DAMAGE as error:
                raise RecordError(f"cannot read {name} in {self._folder.root}: {error}") from error
            columns = (table.column(column).to_pylist() for column in table.column_names)
            known.update(self._make_key(*one) for one in zip(*columns, strict=True))
        return known

    def _make_key(self, prompt_key: bytes, sample: int, settings: str) -> bytes:
        return xxhash.xxh3_128_digest(prompt_key + sample.to_bytes(4, "little") + settings.encode())

    def _open_writer(self) -> Writer:
        tables = {table.digest: table for table in self._id_tables}
        provenance = Provenance.of(
            self._info, _spec_name(self._options), self._options.spec_temperature, tables
        )
        for table in self._id_tables:
            self._folder.put(id_table_file(table.digest.hex()), table.to_bytes())
        numbers = [re.match(r"shard-(\d+)-", name) for name in self._catalog.shards.names()]
        # Behind those that are there, so that the order of the files is that of the texts.
        first = max((int(found[1]) + 1 for found in numbers if found), default=0)
        return Writer(self._folder, provenance, self._catalog.lost, first)

    def _make_row(self, generation: Generation) -> Row:
        prompt, written, targets = generation.prompt_ids, generation.token_ids, generation.targets
        ids = np.concatenate([prompt.numpy(), written.numpy()]).astype(np.int32)
        decode = (lambda *_, **__: "") if self._tokenizer is None else self._tokenizer.decode
        entropy = None if targets is None else targets.entropy
        realized = None if targets is None else targets.realized_logprob
        return Row(
            xxhash.xxh3_128_digest(ids.astype("<i4").tobytes()),
            self._options.seed,
            self._options.epoch,
            _mask_prompt(len(prompt), len(written)),
            ids,
            self._find_payloads(generation),
            Written(
                prompt=decode(prompt.tolist()),
                text=decode(written.tolist(), skip_special_tokens=True),
                prompt_tokens=len(prompt),
                sample=generation.sample,
                finish=generation.finish,
                entropy=None if entropy is None else float(entropy.mean()),
                nats=None if realized is None else -float(realized.mean()),
                repetition=measure_repetition(written.numpy()),
                settings=self.settings,
            ),
        )

    def _find_payloads(self, generation: Generation) -> tuple[bytes, ...]:
        """Returns the containers of a text's targets: one, or few of a long text."""
        if generation.targets is None or self._spec is None:
            return ()
        # Codes of top_k would be rounded once more; what came in small pieces is joined otherwise.
        if self._spec.kind == "top_k" and generation.payloads:
            return generation.payloads
        table = self._id_tables[0] if self._id_tables else None
        parts = encode_parts(generation.targets, self._spec, max_nbytes=PART_NBYTES, id_table=table)
        return tuple(payload for _, _, payload in parts)


def describe_settings(options: GenerateOptions) -> str:
    """Returns how texts are written as JSON: what decides the tokens, beside prompt and teacher."""
    names = ("temperature", "top_k", "top_p", "max_new_tokens", "seed", "epoch")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings["stop_ids"] = sorted(options.stop_ids)
    settings["stop_strings"] = sorted(options.stop_strings)
    settings["ignore_teacher_stop_ids"] = options.ignore_teacher_stop_ids
    return json.dumps(settings, ensure_ascii=False)


def measure_repetition(token_ids: np.ndarray) -> float:
    """Returns the share of a text's runs of GRAM tokens that were in it before; 0 of a short one."""
    if len(token_ids) < GRAM:
        return 0.0
    runs = np.lib.stride_tricks.sliding_window_view(token_ids, GRAM)
    return 1 - len(np.unique(runs, axis=0)) / len(runs)


def _complete(spec: TargetSpec | None, info: teacher_pb2.TeacherInfo) -> TargetSpec | None:
    if spec is None or not spec.needs_hidden:
        return spec
    return spec.for_head(info.head_fingerprint, info.hidden_size)


def _spec_name(options: GenerateOptions) -> str:
    return NO_TARGETS if options.spec is None else str(options.spec)


def _num_before(row: Row) -> int:
    assert row.written is not None
    return row.written.prompt_tokens


def _mask_prompt(num_before: int, num_written: int) -> bytes | None:
    """Packs which of the L - 1 rows have targets: those of the tokens that were written."""
    if num_before == 1:
        return None
    mask = np.zeros(num_before + num_written - 1, dtype=np.uint8)
    mask[num_before - 1 :] = 1
    return np.packbits(mask, bitorder="little").tobytes()
