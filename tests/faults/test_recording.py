"""Recording while replicas are killed, or while it is stopped itself: nothing is lost or different."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq

from student_trainer import Recorded, cli, connect
from tests.conftest import FORKSERVER
from tests.support import tiny
from tests.support.fleet import SMALL_BATCHES, Fleet, wait_until
from tests.support.oracle import VOCAB, digest

SEQUENCES = [ids[:60] for ids in tiny.random_sequences(60, VOCAB, seed=3)]
COLUMNS = ("key", "seed", "epoch", "row_mask", "input_ids", "targets", "teacher", "spec")


def rows_in(folder: Path) -> list[tuple]:
    """Every row of every shard, as any reader of Parquet finds them, in an order of their own."""
    rows = []
    for path in folder.glob("shard-*.parquet"):
        for row in pq.read_table(path, columns=list(COLUMNS)).to_pylist():
            ids, targets = tuple(row.pop("input_ids")), tuple(row.pop("targets"))
            rows.append((ids, targets, *row.values()))
    return sorted(rows)


def record(folder: Path, addresses: list[str], on_pair=lambda number: None) -> list[str]:
    """Records all sequences; what came, by digest."""
    seen = []
    with (
        connect(addresses) as teacher,
        Recorded(folder, teacher, seal_nbytes=4000) as recorded,
    ):
        for number, (_, targets) in enumerate(recorded.stream(SEQUENCES, seed=5, ahead=20)):
            seen.append(digest(targets))
            on_pair(number)
        assert recorded.counters.asked == len(SEQUENCES)
    return seen


def test_a_record_made_while_a_replica_is_killed_has_the_same_rows(serve, folder, tmp_path: Path):
    with Fleet(serve, folder, 2, flags=SMALL_BATCHES, batch_s=0.1) as fleet:
        fleet.wait_known()

        def kill(number: int) -> None:
            if number == 15:
                fleet.kill(1)
                fleet.hurry()

        seen = record(tmp_path / "killed", fleet.addresses, kill)
        assert fleet.live() == [0]
        wanted = record(tmp_path / "quiet", fleet.addresses[:1])
        fleet.assert_nothing_left()
    assert seen == wanted
    assert len(list((tmp_path / "killed").glob("shard-*"))) > 3
    rows = rows_in(tmp_path / "killed")
    assert len(rows) == len(SEQUENCES)
    assert rows == rows_in(tmp_path / "quiet")
    by_ids = {row[0]: row[1] for row in rows}
    assert all(tuple(ids.tolist()) in by_ids for ids in SEQUENCES)


def record_command(log: str, *arguments: str) -> None:
    """`student-trainer record`, as a shell would run it."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main(["record", *arguments]))


def test_ctrl_c_seals_what_came_and_the_next_run_goes_on(serve, tmp_path: Path):
    words = [f"w{number}" for number in range(VOCAB - 2)]
    folder = tiny.save_model(tmp_path / "teacher", "Gemma2", VOCAB)
    tiny.make_tokenizer(words).save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number * number % 997}" for number in range(30 * 60)))
    record, log = tmp_path / "record", tmp_path / "log"
    with Fleet(serve, folder, 1, flags=SMALL_BATCHES, batch_s=0.1) as fleet:
        command = (
            *(str(log), "--teacher", fleet.addresses[0], "--record", str(record), "--json"),
            *("--student", str(folder), "--data", str(text), "--sequence-length", "60"),
        )
        first = FORKSERVER.Process(target=record_command, args=command)
        first.start()
        wait_until(
            lambda: log.exists() and bool(re.search(r"recording, .* [1-9]\d*%", log.read_text())),
            lambda: log.read_text(),
            60,
        )
        assert first.pid is not None
        os.kill(first.pid, signal.SIGINT)
        first.join(30)
        assert first.exitcode == 130, log.read_text()
        assert "Traceback" not in log.read_text()
        came = len(rows_in(record))
        assert 0 < came < 30
        kept = f"{came} sequences are recorded in {record}: run the same command to resume"
        assert log.read_text().splitlines()[-1] == f"student-trainer: interrupted; {kept}"
        fleet.hurry()
        again = FORKSERVER.Process(target=record_command, args=command)
        again.start()
        again.join(60)
        assert again.exitcode == 0, log.read_text()
        fleet.assert_nothing_left()
    numbers = json.loads(re.findall(r"\{.*\}", log.read_text(), re.DOTALL)[-1])
    assert (numbers["asked"], numbers["sequences"]) == (30 - came, 30)
    assert len({row[0] for row in rows_in(record)}) == 30
