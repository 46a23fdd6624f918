"""Records: what comes back is what was written, or it is noticed."""

import itertools
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import pytest
import torch
from torch import Tensor

from logit_codec import Targets, decode, encode, fit_id_table, ids_digest
from logit_codec.teacher_head import HeadFile
from student_trainer import (
    ForkedClient,
    IncompatibleTeacher,
    InvalidRequest,
    LocalTeacher,
    NotRecorded,
    Recorded,
    RecordError,
    TeacherError,
)
from student_trainer.data import batches
from student_trainer.record.folder import QUARANTINE, Folder
from student_trainer.record.provenance import Provenance
from student_trainer.record.schema import Row
from student_trainer.record.shards import DAMAGE, Shards
from student_trainer.record.writer import Writer
from student_trainer.teachers.request import Answer, Piece
from tests.conftest import FORKSERVER, one_torch_thread
from tests.support import tiny
from tests.support.fleet import wait_until

VOCAB = 500
SPECS = [
    *("sampled", "top_k:min_p=1/64", "dense:f32", "given_ids", "given_ids:bits=32,ranks=1"),
    *("realized", "hidden:int8", "hidden:bf16", "features:layers=0+2"),
]

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.fixture(scope="module")
def live() -> LocalTeacher:
    return LocalTeacher(tiny.make_model("Gemma2", VOCAB))


def make_sequences(count: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (count,), generator=generator).tolist()
    return [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]


SEQUENCES = make_sequences()


def write(where: object, teacher: LocalTeacher, sequences=SEQUENCES, **options) -> list[Targets]:
    """Records the sequences; returns what the recording run saw."""
    seal_nbytes = options.pop("seal_nbytes", 3000)
    with Recorded(str(where), teacher, seal_nbytes=seal_nbytes) as record:
        return [targets for _, targets in record.stream(sequences, **options)]


def same(one: Targets, other: Targets) -> bool:
    """Whether every tensor is bit-identical."""
    mine, theirs = one._tensors(), other._tensors()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.parquet"))


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Silent:
    """A teacher that must not be asked."""

    def __init__(self, teacher: LocalTeacher) -> None:
        self.info, self.id_tables = teacher.info, ()

    def submit(self, *_: object) -> None:
        raise AssertionError("the live teacher was asked")


def ids_for(sequence: Tensor, seed: int = 0) -> Tensor:
    """One to nine ids to give for each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (len(sequence) - 1, 9), generator=generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -1).index_fill(
        1, torch.tensor([4]), 7
    )


def keep_head(live: LocalTeacher, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the teacher's vocabulary head where a host keeps those that it fetched."""
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(folder))
    head = live.head()
    file = HeadFile(head)
    path = folder / "heads" / f"{head.fingerprint}.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(file.read(0, file.nbytes))


@pytest.mark.parametrize("spec", SPECS)
def test_a_replay_is_what_the_recording_run_saw_and_what_the_live_teacher_says(
    live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec
):
    options: dict[str, Any] = {"targets": spec, "seed": 5}
    if spec.startswith("given_ids"):
        options["given_ids"] = [ids_for(sequence) for sequence in SEQUENCES]
    keep_head(live, tmp_path / "cache", monkeypatch)
    seen = write(tmp_path, live, **options, seal_nbytes=500 if spec == "realized" else 3000)
    said = [targets for _, targets in live.stream(SEQUENCES, **options)]
    assert len(shards_in(tmp_path)) > 1
    with Recorded(tmp_path) as record:
        assert len(record) == len(SEQUENCES)
        assert record.info.teacher_fingerprint == live.info.teacher_fingerprint
        for _ in range(2):
            replayed = [targets for _, targets in record.stream(SEQUENCES, **options)]
            for one, two, three in zip(seen, said, replayed, strict=True):
                assert same(one, two)
                assert same(one, three)


def test_targets_are_found_in_any_order_and_batch_size_and_on_every_rank(live, tmp_path: Path):
    ids = torch.stack([torch.arange(8) + 20 * number for number in range(24)])
    expected = dict(enumerate(write(tmp_path, live, list(ids))))
    with Recorded(tmp_path) as record:
        for batch_size, seed in itertools.product((1, 5, 8), (0, 1)):
            loader = list(batches(ids, batch_size=batch_size, steps=9, seed=seed))
            for rank in range(2):
                for batch, targets in record.stream_batches(loader[rank::2], epoch=7):
                    numbers = (batch["input_ids"][:, 0] // 20).tolist()
                    assert same(targets, Targets.cat([expected[one] for one in numbers]))


def test_rows_that_are_not_trained_are_left_out(live, tmp_path: Path):
    """Recorded whole and asked for in part, and recorded in part."""
    padded = torch.nn.utils.rnn.pad_sequence(SEQUENCES[:4], batch_first=True)
    labels = torch.where(padded % 3 == 0, -100, padded)
    mask = (
        torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in SEQUENCES[:4]])[:, None]
    )
    batch = {"input_ids": padded, "labels": labels, "attention_mask": mask}
    for spec in SPECS[:3]:
        ((_, said),) = live.stream_batches([batch], targets=spec)
        whole, part = tmp_path / f"whole-{spec[0]}", tmp_path / f"part-{spec[0]}"
        write(whole, live, SEQUENCES[:4], targets=spec)
        with Recorded(part, live) as record:
            ((_, seen),) = record.stream_batches([batch], targets=spec)
        assert same(seen, said)
        for folder in (whole, part):
            with Recorded(folder) as record:
                ((_, replayed),) = record.stream_batches([batch], targets=spec)
                assert same(replayed, said)
        with Recorded(part) as record, pytest.raises(NotRecorded, match="not asked for"):
            next(record.stream(SEQUENCES[:1]))


def test_the_same_text_with_other_given_ids_is_another_sequence(live, tmp_path: Path):
    sequence = SEQUENCES[0]
    with Recorded(tmp_path, live) as record:
        for seed in (0, 1, 0):
            given = [ids_for(sequence, seed)]
            list(record.stream([sequence], targets="given_ids", given_ids=given))
        assert (record.counters.asked, record.counters.replayed) == (2, 1)
        assert record.has(sequence, given_ids=ids_for(sequence, 1))
        assert not record.has(sequence, given_ids=ids_for(sequence, 2))
    with Recorded(tmp_path) as record:
        assert record.get(sequence, given_ids=ids_for(sequence, 1)).kind == "given_ids"
        with pytest.raises(NotRecorded, match="these given ids"):
            record.get(sequence, given_ids=ids_for(sequence, 2))


def test_recorded_hidden_states_need_the_head_and_say_where_it_comes_from(
    live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / "record", live, targets="hidden:int8")
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path / "cache"))
    with (
        Recorded(tmp_path / "record") as record,
        pytest.raises(TeacherError, match=r"is not in .*Connect to the teacher"),
    ):
        list(record.stream(SEQUENCES))
    with Recorded(tmp_path / "record") as record:
        assert record.get(SEQUENCES[0]).head is None
    with Recorded(tmp_path / "record", live) as record:
        assert record.get(SEQUENCES[0]).head is not None


def test_what_is_recorded_is_not_asked_for_again(live, tmp_path: Path):
    write(tmp_path, live, SEQUENCES[:6])
    with Recorded(tmp_path, live) as record:
        list(record.stream(SEQUENCES))
        assert (record.counters.asked, record.counters.replayed) == (6, 6)
    with Recorded(tmp_path, Silent(live)) as record:
        list(record.stream(SEQUENCES * 2))
    assert len(Recorded(tmp_path)) == 12


def test_a_sequence_that_comes_twice_is_asked_for_once(live, tmp_path: Path):
    """Also when the first answer is still on its way, and in another epoch."""
    with Recorded(tmp_path, live) as record:
        pairs = record.stream_batches(
            [{"input_ids": SEQUENCES[0], "epoch": epoch} for epoch in (0, 0, 1, 5)], ahead=4
        )
        first, *others = [targets for _, targets in pairs]
        assert record.counters.asked == 1
        assert all(same(first, other) for other in others)


def test_several_draws_are_recorded_and_then_taken_in_turn(live, tmp_path: Path):
    ids = SEQUENCES[0]

    def said(epoch: int) -> Targets:
        return next(live.stream([ids], seed=2, epoch=epoch))[1]

    with Recorded(tmp_path, live, draws=3) as record:
        seen = [next(record.stream([ids], seed=2, epoch=epoch))[1] for epoch in range(7)]
        assert record.counters.asked == 3
    assert not same(said(0), said(1))
    for epoch, targets in enumerate(seen):
        assert same(targets, said(epoch % 3))
    with Recorded(tmp_path) as record:
        assert len(record) == 3
        for epoch in range(7):
            assert same(record.get(ids, seed=2, epoch=epoch), said(epoch % 3))
            assert same(record.get(ids, seed=8, epoch=epoch), said(epoch % 3))


def test_ranks_that_record_the_same_sequence_get_the_same_draws(live, tmp_path: Path):
    """Whichever epoch it comes in first, and although they do not see each other's rows."""
    ids = SEQUENCES[0]
    epochs = {"a": (0, 1, 3, 4), "b": (3, 5, 2)}
    seen = {}
    with (
        Recorded(tmp_path, live, draws=2) as one,
        Recorded(tmp_path, live, draws=2) as other,
    ):
        for rank, record in (("a", one), ("b", other)):
            for epoch in epochs[rank]:
                seen[rank, epoch] = next(record.stream([ids], epoch=epoch))[1]
    with Recorded(tmp_path) as record, Recorded(tmp_path, Silent(live)) as more:
        for (_, epoch), targets in seen.items():
            assert same(targets, record.get(ids, epoch=epoch))
            assert same(targets, next(more.stream([ids], epoch=epoch))[1])


def test_another_teacher_tokenizer_or_spec_is_refused(live, tmp_path: Path):
    write(tmp_path, live)
    other = LocalTeacher(tiny.make_model("Gemma2", VOCAB, seed=1))
    with pytest.raises(IncompatibleTeacher) as caught:
        Recorded(tmp_path, other)
    for fingerprint in (live.info.teacher_fingerprint, other.info.teacher_fingerprint):
        assert fingerprint in str(caught.value)
    assert "with another set of weights." in str(caught.value)
    with Recorded(tmp_path) as record:
        for asked in ({"targets": "sampled:65"}, {"targets": "top_k:4"}, {"temperature": 2.0}):
            with pytest.raises(InvalidRequest, match="holds sampled:64 at temperature 1"):
                record.stream(SEQUENCES, **asked)
    write(tmp_path / "other", other)
    shutil.copy(shards_in(tmp_path / "other")[0], tmp_path)
    with pytest.raises(IncompatibleTeacher, match="holds two records"):
        Recorded(tmp_path)


def test_another_release_of_torch_does_not_orphan_a_record(
    tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
):
    """Replayed, added to, and replayed again, without another word than a note; the service itself
    has another fingerprint, since it may answer with other bits."""
    caplog.set_level(logging.INFO)
    model = tiny.make_model("Gemma2", VOCAB)
    before = LocalTeacher(model)
    first = write(tmp_path, before, SEQUENCES[:6])
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    after = LocalTeacher(model)
    assert after.info.teacher_fingerprint != before.info.teacher_fingerprint
    with Recorded(tmp_path, after, seal_nbytes=3000) as record:
        both = [targets for _, targets in record.stream(SEQUENCES)]
        assert (record.counters.replayed, record.counters.asked) == (6, 6)
    assert all(map(same, first, both))
    assert "recorded from the same weights of local under another fingerprint" in caplog.text
    with Recorded(tmp_path) as record:
        assert all(map(same, both, (targets for _, targets in record.stream(SEQUENCES))))
    assert "was recorded under 2 fingerprints of one teacher's weights" in caplog.text


def test_a_record_of_another_tokenizer_is_refused(tmp_path: Path):
    words = [f"w{number}" for number in range(VOCAB - 2)]
    teacher = LocalTeacher(tiny.make_model("Gemma2", VOCAB), tiny.make_tokenizer(words))
    write(tmp_path, teacher)
    Recorded(tmp_path, tokenizer=tiny.make_tokenizer(words)).close()
    with pytest.raises(IncompatibleTeacher, match="tokenizers differ"):
        Recorded(tmp_path, tokenizer=tiny.make_tokenizer([*words[1:], "other"]))


def test_what_is_not_recorded_is_an_error_that_says_what_to_do(live, tmp_path: Path):
    with pytest.raises(RecordError, match=r"there is no record in .*student-trainer record"):
        Recorded(tmp_path / "nothing")
    write(tmp_path, live)
    with Recorded(tmp_path) as record:
        with pytest.raises(NotRecorded, match="stream item 1: this sequence is not in the record"):
            list(record.stream([SEQUENCES[0], torch.arange(5)]))
        with pytest.raises(NotRecorded):
            record.get([1, 2, 3])
        assert record.has(SEQUENCES[3], 4, 4)
        assert not record.has(torch.arange(5))
    with pytest.raises(TeacherError, match="closed"):
        record.get(SEQUENCES[0])
    with pytest.raises(RecordError, match="cannot use nowhere"):
        Recorded("nowhere://bucket/targets")


def test_a_fork_is_told_to_open_the_record_itself(live, tmp_path: Path):
    write(tmp_path, live)
    with Recorded(tmp_path) as record:
        record._pid += 1
        with pytest.raises(ForkedClient, match="Open it again"):
            next(record.stream(SEQUENCES))
        record._pid -= 1


def test_pandas_duckdb_and_datasets_read_it(live, tmp_path: Path):
    import datasets
    import duckdb
    import pandas

    record = tmp_path / "record"
    write(record, live)
    (record / QUARANTINE).mkdir()  # what else is in the folder is left out
    (record / QUARANTINE / "shard-00000.parquet").write_bytes(b"torn")
    expected = {tuple(ids.tolist()): targets for ids, targets in live.stream(SEQUENCES)}
    frame = pandas.read_parquet(record)
    rows = duckdb.sql(f"select input_ids, targets from read_parquet('{record}/*.parquet')")
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(record), split="train", cache_dir=str(tmp_path / "cache")
    )
    read = [
        list(zip(frame["input_ids"], frame["targets"], strict=True)),
        [row[:2] for row in rows.fetchall()],
        [(row["input_ids"], row["targets"]) for row in loaded],
    ]
    for pairs in read:
        assert len(pairs) == len(SEQUENCES)
        for ids, payloads in pairs:
            targets = Targets.cat([decode(payload) for payload in payloads])
            assert same(targets, expected[tuple(int(one) for one in ids)])
    assert set(frame["spec"]) == {"sampled:64"}
    assert set(frame["teacher"]) == {live.info.teacher_fingerprint}


def test_the_code_in_the_docs_reads_it(live, tmp_path: Path, monkeypatch, capsys):
    page = (Path(__file__).parents[3] / "docs" / "recording.md").read_text()
    section = page.partition("## Reading it without this code")[2]
    programs = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(programs) == 2
    write(tmp_path / "targets" / "stories", live)
    monkeypatch.chdir(tmp_path)
    for program in programs:
        exec(program, {})
    printed = capsys.readouterr().out
    assert live.info.teacher_fingerprint in printed
    assert "SampledTargets(" in printed
    assert "mean" in printed


def test_a_remote_store_works_as_a_folder_does(live):
    where = "memory://bucket/targets"
    seen = write(where, live)
    with Recorded(where) as record:
        replayed = [targets for _, targets in record.stream(SEQUENCES)]
    assert all(map(same, seen, replayed))
    files = fsspec.filesystem("memory")
    shard = next(name for name in files.ls("/bucket/targets", detail=False) if "shard" in name)
    content = bytearray(files.cat_file(shard))
    content[len(content) // 3] ^= 4
    files.pipe_file(shard, bytes(content))
    with Recorded(where, live, verify=True) as record:
        assert record.counters.quarantined == 1
        assert all(map(same, seen, (targets for _, targets in record.stream(SEQUENCES))))
    files.rm("/bucket", recursive=True)


def test_targets_coded_with_a_table_come_with_it(live, tmp_path: Path):
    table = fit_id_table(torch.arange(VOCAB, 0, -1).float(), 10 * VOCAB)

    class Tabled(LocalTeacher):
        id_tables = (table,)

        def submit(self, *request) -> "Future[Answer]":
            future: Future[Answer] = Future()
            answer = super().submit(*request).result()
            future.set_result(Answer(answer.targets, (encode(answer.targets, id_table=table),)))
            return future

    tabled = Tabled(tiny.make_model("Gemma2", VOCAB))
    seen = write(tmp_path, tabled)
    with Recorded(tmp_path) as record:
        assert [one.digest for one in record.id_tables] == [table.digest]
        assert all(map(same, seen, (targets for _, targets in record.stream(SEQUENCES))))
    (path,) = tmp_path.rglob("id_table-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecordError, match="id_table-"):
        Recorded(tmp_path)
    Recorded(tmp_path, tabled).close()


def test_every_truncation_and_every_flipped_bit_of_a_shard_is_noticed(live, tmp_path: Path):
    write(tmp_path, live, SEQUENCES[:1])
    (path,) = shards_in(tmp_path)
    content = path.read_bytes()
    shards = Shards(Folder(tmp_path))
    assert shards.is_whole(path.name)
    with path.open("r+b") as file:
        for place in range(len(content)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([content[place] ^ 1 << bit]), place)
                assert not shards.is_whole(path.name)
            os.pwrite(file.fileno(), content[place : place + 1], place)
        assert shards.is_whole(path.name)
        for length in reversed(range(len(content))):
            os.ftruncate(file.fileno(), length)
            assert not shards.is_whole(path.name)


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_a_shard_is_noticed_by_whoever_reads_a_row(tmp_path: Path, step: int):
    """Without comparing the whole file first: what comes is right, or an error."""
    provenance = Provenance({"model": "m"}, "sampled:64", 1.0)
    rows = [
        Row(
            bytes([i]) * 16,
            0,
            i,
            None if i else b"\x07",
            np.arange(20 + i, dtype=np.int32),
            (bytes(range(60)),),
        )
        for i in range(3)
    ]
    name = Writer(Folder(tmp_path), provenance).seal(rows)
    path = tmp_path / name
    content = path.read_bytes()
    noticed = 0
    for place in range(0, 8 * len(content), step):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        shards = Shards(Folder(tmp_path))
        for number, row in enumerate(rows):
            try:
                assert shards.provenance(name) == provenance
                payloads = shards.payloads(name, number, (row.key, row.seed, row.epoch))
                assert tuple(payloads) == row.payloads, f"bit {place}"
            except DAMAGE:
                noticed += 1
        shards.close()
    assert noticed > 3 * 8 * len(content) / step / 3


@pytest.mark.parametrize("step", [199, pytest.param(1, marks=pytest.mark.slow)])
def test_unverified_damage_is_never_trained_on(live, tmp_path: Path, step: int):
    """Where shards are not read whole first, what is read is right, or asked for again."""
    seen = write(tmp_path / "good", live, SEQUENCES[:3], seal_nbytes=1 << 20)
    (good,) = shards_in(tmp_path / "good")
    content = good.read_bytes()
    chance = random.Random(0)
    noticed = 0
    places = range(0, len(content), step)
    for place in places:
        folder = tmp_path / "damaged"
        folder.mkdir()
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (folder / good.name).write_bytes(damaged)
        with Recorded(folder, live, verify=False) as record:
            replayed = [targets for _, targets in record.stream(SEQUENCES[:3])]
            noticed += record.counters.quarantined
        assert all(map(same, seen, replayed)), f"byte {place}"
        shutil.rmtree(folder)
    print(f"{noticed} of {len(places)} noticed in what was read")
    assert noticed > len(places) / 2


@pytest.mark.parametrize("damage", ["torn", "flipped", "deleted", "empty"])
def test_a_damaged_shard_is_named_put_aside_and_scored_again(
    live, tmp_path: Path, damage, caplog: pytest.LogCaptureFixture
):
    seen = write(tmp_path, live)
    others = {path.name: path.read_bytes() for path in shards_in(tmp_path)}
    victim = shards_in(tmp_path)[1]
    content = others.pop(victim.name)
    if damage == "deleted":
        victim.unlink()
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        changed = {"torn": content[:-9], "flipped": bytes(flipped), "empty": b""}
        victim.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING), Recorded(tmp_path) as record:
        assert victim.name in caplog.text
        assert victim.exists() or damage == "deleted"
        what = f"{victim.name} is {'missing' if damage == 'deleted' else 'damaged'}"
        with pytest.raises(NotRecorded, match=what) as caught:
            list(record.stream(SEQUENCES))
        assert "other text" not in str(caught.value), "what is known needs no guess"
    with Recorded(tmp_path, live) as record:
        assert all(map(same, seen, (targets for _, targets in record.stream(SEQUENCES))))
        assert 0 < record.counters.asked < len(SEQUENCES)
    assert (tmp_path / QUARANTINE / victim.name).exists() == (damage != "deleted")
    assert all((tmp_path / name).read_bytes() == was for name, was in others.items())
    caplog.clear()
    with Recorded(tmp_path) as record:
        assert all(map(same, seen, (targets for _, targets in record.stream(SEQUENCES))))
    assert not caplog.text  # told once


def test_damage_that_comes_after_the_opening_is_noticed(live, tmp_path: Path):
    seen = write(tmp_path, live)
    with Recorded(tmp_path, live) as record:
        for path in shards_in(tmp_path):
            os.truncate(path, path.stat().st_size // 2)
        assert all(map(same, seen, (targets for _, targets in record.stream(SEQUENCES))))
        assert record.counters.quarantined > 1
    with Recorded(tmp_path) as record:
        (one, *_) = shards_in(tmp_path)
        ids = next(
            ids
            for ids in SEQUENCES
            if record._catalog._index.find(ids_digest(ids))[0].shard == one.name
        )
        content = one.read_bytes()
        one.write_bytes(bytes(len(content) // 2) + content[len(content) // 2 :])
        with pytest.raises(NotRecorded, match=one.name):
            record.get(ids)


def test_what_is_replayed_together_is_answered_one_by_one(live, tmp_path: Path):
    """What is damaged or given up among sequences that wait at once is nothing to the others."""
    seen = write(tmp_path, live)
    victim = shards_in(tmp_path)[0]
    with Recorded(tmp_path) as record:
        found = [record._catalog._index.find(ids_digest(ids))[0].shard for ids in SEQUENCES]
        given_up = found.index(shards_in(tmp_path)[1].name)
        os.truncate(victim, 16)
        asked_for_all = threading.Event()
        record._worker.submit(asked_for_all.wait)
        options = record.make_options(None, 1.0, 0, 0)
        futures = [record.submit(Piece(ids), options) for ids in SEQUENCES]
        assert futures[given_up].cancel()
        asked_for_all.set()
        for number, (future, shard) in enumerate(zip(futures, found, strict=True)):
            if shard == victim.name:
                with pytest.raises(NotRecorded, match=victim.name):
                    future.result()
            elif number != given_up:
                assert same(future.result().targets, seen[number])
        assert futures[given_up].cancelled()
        assert record.counters.quarantined == 1
        assert record.counters.replayed == len(SEQUENCES) - found.count(victim.name) - 1


def test_a_read_only_folder_is_replayed_and_refuses_to_grow(live, tmp_path: Path):
    write(tmp_path, live, SEQUENCES[:6])
    before = contents(tmp_path)
    with Recorded(tmp_path, live, write=False) as record:
        list(record.stream(SEQUENCES))
        assert record.counters.asked == 6
    assert contents(tmp_path) == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RecordError, match=r"cannot write .*file"), Recorded(file, live) as record:
        list(record.stream(SEQUENCES))


def fill_disk(folder: str, pipe) -> None:
    """Records with room for so many bytes per file, and says how it ended."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    teacher = LocalTeacher(tiny.make_model("Gemma2", VOCAB))
    record = Recorded(folder, teacher, seal_nbytes=2000)
    try:
        list(record.stream([*SEQUENCES, torch.arange(250), *make_sequences(4, 9)]))
    except RecordError as error:
        pipe.send(str(error))
    try:
        list(record.stream(SEQUENCES))
    except RecordError as error:
        pipe.send(str(error))


def test_a_file_that_cannot_be_written_whole_stops_with_intact_data(live, tmp_path: Path):
    here, there = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=fill_disk, args=(str(tmp_path), there))
    process.start()
    message = here.recv() if here.poll(60) else ""
    assert "cannot write" in message
    assert "File too large" in message
    assert "intact" in message
    assert here.poll(60)
    assert here.recv() == message  # it does not go on as if nothing had happened
    process.join()
    with Recorded(tmp_path) as record:
        recorded = [one for one in SEQUENCES if record.has(one)]
        assert recorded
        said = (targets for _, targets in live.stream(recorded))
        assert all(map(same, said, (targets for _, targets in record.stream(recorded))))
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_a_full_disk_stops_with_intact_data(live, tmp_path: Path, tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    small = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run([*mounted, small], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a user mount a small disk")
    sequences = make_sequences(400, 1)
    write(source / "record", live, sequences)
    torch.save(sequences, source / "sequences.pt")
    program = (
        "import sys, torch\n"
        "from student_trainer import Recorded, RecordError\n"
        "source, where = sys.argv[1:]\n"
        "try:\n"
        "    with Recorded(where, Recorded(f'{source}/record'), seal_nbytes=3000) as record:\n"
        "        for _ in record.stream(torch.load(f'{source}/sequences.pt')): pass\n"
        "except RecordError as error: print(error)\n"
    )
    there = f"{sys.executable} -c '$PROGRAM' {source} {tmp_path}".replace("'", '"')
    ran = subprocess.run(
        [*mounted, f"{small} && {there} && cp -r {tmp_path}/. {source}/left"],
        env={**os.environ, "PROGRAM": program, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No space left on device" in ran.stdout, ran.stderr
    assert "cannot write" in ran.stdout
    with Recorded(source / "left") as record:
        assert record.counters.quarantined == 0
        recorded = [one for one in sequences if record.has(one)]
        assert len(recorded) > 5
        said = (targets for _, targets in live.stream(recorded))
        assert all(map(same, said, (targets for _, targets in record.stream(recorded))))


def record_for_ever(folder: str, ready) -> None:
    """Records one small shard after the other until it is killed."""
    torch.set_num_threads(1)
    teacher = LocalTeacher(tiny.make_model("Gemma2", VOCAB))
    with Recorded(folder, teacher, seal_nbytes=1500) as record:
        ready.send(len(record))
        for seed in itertools.count():
            for _ in record.stream(make_sequences(20, seed)):
                pass


@pytest.fixture
def killed(tmp_path: Path) -> Callable[[int, float], int]:
    """killed(new_shards, seconds) -> what was recorded before; the process that records is killed so
    long after it has sealed so many shards."""

    def run(new_shards: int, seconds: float) -> int:
        here, there = FORKSERVER.Pipe()
        process = FORKSERVER.Process(target=record_for_ever, args=(str(tmp_path), there))
        process.start()
        assert here.poll(60)
        before, wanted = here.recv(), len(shards_in(tmp_path)) + new_shards
        wait_until(lambda: len(shards_in(tmp_path)) >= wanted, "shards are sealed", 60)
        time.sleep(seconds)
        process.kill()
        process.join()
        return before

    return run


@pytest.mark.parametrize(
    "kills", [4, pytest.param(25, marks=pytest.mark.slow)], ids=["a few", "25"]
)
def test_a_kill_loses_nothing_that_was_sealed_and_shows_nothing_torn(
    live, tmp_path: Path, killed, kills: int
):
    chance = random.Random(kills)
    sealed: dict[str, bytes] = {}
    for _ in range(kills):
        before = killed(chance.randrange(4), chance.uniform(0.0, 0.1))
        now = {path.name: path.read_bytes() for path in shards_in(tmp_path)}
        assert sealed.items() <= now.items()
        sealed = now
        with Recorded(tmp_path, live, write=False) as record:
            assert record.counters.quarantined == 0
            assert len(record) >= before
    assert len(sealed) > kills
    with Recorded(tmp_path) as record:
        for seed in itertools.count():
            recorded = [one for one in make_sequences(20, seed) if record.has(one)]
            if not recorded:
                break
            said = [targets for _, targets in live.stream(recorded)]
            assert all(map(same, said, (targets for _, targets in record.stream(recorded))))
    manifests = [json.loads(path.read_text()) for path in tmp_path.rglob("manifest-*.json")]
    assert {one["name"] for manifest in manifests for one in manifest["shards"]} <= sealed.keys()
    write(tmp_path, live, make_sequences(1, 10**6))
    assert not list(tmp_path.rglob(".*.partial"))


def test_what_was_not_sealed_is_sealed_when_the_program_ends(live, tmp_path: Path):
    write(tmp_path / "source", live)
    program = (
        "import sys, torch\n"
        "from student_trainer import Recorded\n"
        "record = Recorded(sys.argv[2], Recorded(sys.argv[1]))\n"
        f"ids = {[one.tolist() for one in SEQUENCES[:3]]}\n"
        "list(record.stream(ids))\n"
        "raise SystemExit(7)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "source"), str(tmp_path / "copy")],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (7, "")
    with Recorded(tmp_path / "copy") as record:
        assert len(record) == 3


def test_a_closed_record_counts_what_is_on_the_disk(live, tmp_path: Path):
    """Not what was asked for and never came, as when somebody presses Ctrl-C."""

    class Slow(Silent):
        """Answers the first five."""

        def submit(self, *arguments: Any) -> "Future[Answer]":
            answered.append(arguments)
            return live.submit(*arguments) if len(answered) <= 5 else Future()

    answered: list[object] = []
    with Recorded(tmp_path, cast("Any", Slow(live)), seal_nbytes=3000) as record:
        pairs = record.stream(SEQUENCES, ahead=9)
        for _ in range(5):
            next(pairs)
        assert len(answered) > 5
    with Recorded(tmp_path) as again:
        assert len(record) == len(again) == 5


def test_given_up_requests_are_asked_for_again(live, tmp_path: Path):
    def endless() -> Iterator[Tensor]:
        return itertools.cycle(SEQUENCES)

    with Recorded(tmp_path, live) as record:
        stream = record.stream(endless(), ahead=5)
        next(stream)
        stream.close()
        pairs = record.stream(SEQUENCES)
        said = (targets for _, targets in live.stream(SEQUENCES))
        assert all(map(same, said, (targets for _, targets in pairs)))


def test_a_store_that_is_away_for_a_moment_is_no_damage(live, monkeypatch):
    where = "memory://bucket/away"
    seen = write(where, live)
    away = True

    def open_or_not(self, *arguments, **options):
        if away:
            raise ConnectionError("the network is down")
        return opened(self, *arguments, **options)

    with Recorded(where, live) as record:
        record._catalog.shards.close()  # as if more shards had been read than are kept open
        opened = fsspec.filesystem("memory").__class__.open
        monkeypatch.setattr(fsspec.filesystem("memory").__class__, "open", open_or_not)
        with pytest.raises(RecordError, match=r"cannot read shard-.* the network is down"):
            list(record.stream(SEQUENCES))
        away = False
        assert all(map(same, seen, (targets for _, targets in record.stream(SEQUENCES))))
        assert (record.counters.quarantined, record.counters.asked) == (0, 0)
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
