"""A team that asks for one sequence at a time beside one that floods a replica with dense work.

The replica writes down what it does, and encodes slowly. What is asserted is the order: how much of
the flood is computed and encoded between a request of the light team and its answer.
"""

import asyncio
import statistics
import threading
import time
from functools import partial
from pathlib import Path

from student_trainer import connect
from teacher_server.pipeline.encoding import NUM_THREADS
from tests.faults.test_teams_live import Load, Shared

VOCAB = 8009
"""A dense answer of LENGTH tokens is 2 MB, in two parts."""
ENCODE_S = 0.02
"""Of each part."""
STREAMS = 6
IN_FLIGHT = 8
"""Of each stream of the flood: what the stream has room for."""
NUM_ASKED = 25


def write_down(path: Path) -> None:
    """Runs in the service: each step of each job is a line of the file, in the order of time."""
    from teacher_server.pipeline import encoding
    from teacher_server.pipeline.batches import BatchScorer
    from teacher_server.scheduling.scheduler import Scheduler

    file, lock = path.open("a", buffering=1), threading.Lock()
    submit, charge, encode_parts = Scheduler.submit, BatchScorer._charge, encoding.encode_parts

    def note(*words: str) -> None:
        with lock:
            file.write(" ".join(words) + "\n")

    def submitted(self, job):
        note("asked", job.team.name)
        return submit(self, job)

    def charged(self, batch):
        note("pass", *(job.team.name for job in batch))
        return charge(self, batch)

    def encoded(targets, spec, **options):
        for part in encode_parts(targets, spec, **options):
            time.sleep(ENCODE_S)
            note("part", "flood" if spec.kind == "dense" else "light")
            yield part

    Scheduler.submit, BatchScorer._charge, encoding.encode_parts = submitted, charged, encoded


def before_answers(lines: list[str]) -> list[tuple[int, int]]:
    """Of each request of the light team: passes of the flood alone before its own, and parts of the
    flood before its answer is encoded."""
    found: list[tuple[int, int]] = []
    passes = parts = 0
    is_asked = is_scored = False
    for line in lines:
        what, *teams = line.split()
        if what == "asked" and teams == ["light"]:
            assert not is_asked, "one at a time"
            is_asked, is_scored, passes, parts = True, False, 0, 0
        elif what == "pass":
            is_scored = is_scored or "light" in teams
            passes += not is_scored
        elif what == "part" and teams == ["light"] and is_asked:
            found.append((passes, parts))
            is_asked = False
        elif what == "part":
            parts += 1
    return found


def test_one_sequence_at_a_time_is_answered_beside_a_flood_of_dense_answers(
    serve, model_folder, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    weights = {"light": 1.0, "flood": 1.0}
    ids = list(range(20))

    def ask(address: str, fleet: Shared) -> list[float]:
        """What a person at a prompt does, with the client that everybody has."""
        connection = fleet.connections["light"]
        waits = []
        with connect(address, token=connection.token, ca=tmp_path / "ca.pem") as teacher:
            for _ in range(NUM_ASKED):
                began = time.monotonic()
                ((_, targets),) = teacher.stream([ids], targets="top_k:4")
                waits.append(time.monotonic() - began)
                assert targets.num_rows == len(ids) - 1
        return sorted(waits)

    async def run(fleet: Shared) -> list[float]:
        load = Load(fleet)
        load.flood("flood", streams=STREAMS, window=IN_FLIGHT)
        await asyncio.sleep(3 * ENCODE_S * STREAMS * IN_FLIGHT)  # until all queues are full
        waits = await asyncio.to_thread(ask, fleet.own[0], fleet)
        answered = len(load.answers)
        await asyncio.sleep(1.0)
        assert len(load.answers) > answered, "the flood goes on"
        await load.end()
        return waits

    hook = partial(write_down, log)
    with Shared(
        serve, model_folder("Gemma2", VOCAB), tmp_path, weights, count=1, hook=hook
    ) as fleet:
        fleet.hurry()
        waits = asyncio.run(run(fleet))
        fleet.assert_nothing_left()
    found = before_answers(log.read_text().splitlines())
    passes, parts = (sorted(numbers) for numbers in zip(*found, strict=True))
    print(
        f"\np50 {statistics.median(waits):.3f} s, worst {waits[-1]:.3f} s; of the flood before an "
        f"answer: passes {passes}, parts {parts}"
    )
    assert len(found) == NUM_ASKED
    assert passes[-1] <= 2, "in the next batch, or the one after it"
    assert statistics.median(parts) <= 6 * NUM_THREADS, (
        "not behind all that the flood has to be encoded"
    )
