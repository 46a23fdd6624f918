"""How long a trainer stands still when something happens to a replica, and what stalled readers cost.

Run `python -m benchmarks.faults` (`--quick` for one repetition of everything). Real services in
processes of their own: two replicas of a tiny Gemma 2 on the CPU, each forward made 50 ms long so
that a batch is always in hand, and one client with 32 sequences in flight.

A *stall* is the longest time between two answers in the 10 s after the fault; without a
fault it is one batch or two. Resets and cuts happen in a TCP proxy before the first replica; "alone"
means that the second one is out of reach. The drain counts errors at the client, there must be none.

Memory is the growth of a replica's resident set while a reader that was offered 800 MiB of answers
(parts of 1 MiB) has taken one part and stopped, after a first stalled reader was there and gone. The
other client's throughput is measured in turns without and with the stalled reader; the change is the
median of the turns' ratios. A killed client's slots are free when its stream and its queued tokens are
gone from the metrics.

Every figure is the median over the repetitions with the least and the greatest, beside its limit.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from student_trainer import connect
from student_trainer.client.remote import RemoteTeacher
from tests.conftest import ENDLESS_CLIENT, Serve, services
from tests.support import tiny
from tests.support.fleet import SMALL_BATCHES, Fleet, wait_until
from tests.support.stalled import StalledReader, tokens_per_s

VOCAB = 1001
LARGE_VOCAB = 32_003
BATCH_S = 0.05
AHEAD = 32
WATCH_S = 10.0


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="Recovery times and the cost of stalled readers.")
    parser.add_argument("--quick", action="store_true", help="one repetition, for a first look")
    options = parser.parse_args()
    repetitions = 1 if options.quick else 3
    rounds = 3 if options.quick else 10
    rows: list[tuple[str, list[float], str, str]] = []

    def row(name: str, unit: str, limit: str, measure: Callable[[], float], count: int) -> None:
        values = []
        for _ in range(count):
            values.append(measure())
            print(f"{name}: {values[-1]:.2f} {unit}", file=sys.stderr, flush=True)
        rows.append((name, values, unit, limit))

    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        serve = stack.enter_context(services(where))
        folder = tiny.save_model(where / "small", "Gemma2", VOCAB)
        large = tiny.save_model(where / "large", "Llama", LARGE_VOCAB)
        for name, limit, fault in STALLS:
            row(name, "s", limit, lambda fault=fault: stall(serve, folder, fault), repetitions)
        row("killed client, slots freed", "s", "1", lambda: slots(serve, folder), repetitions)
        with Fleet(serve, large, 1) as fleet:
            growths, changes = stalled_reader(fleet, rounds)
        rows.append(("growth for 800 MiB offered", growths, "MiB", "32"))
        rows.append(("another client's throughput", changes, "%", "-3"))

    print(f"\n{'':44}  median     min     max   limit")
    for name, values, unit, limit in rows:
        middle = statistics.median(values)
        print(f"{name:44}{middle:8.2f}{min(values):8.2f}{max(values):8.2f}  {limit:>5} {unit}")


def stall(serve: Serve, folder: Path, fault: "Fault") -> float:
    """The longest time without an answer after a fault, in seconds; raises if the client fails."""
    with Fleet(serve, folder, flags=SMALL_BATCHES, batch_s=BATCH_S, proxied=True) as fleet:
        fleet.wait_known()
        with connect(fleet.addresses) as teacher:
            sequences = iter(lambda: torch.arange(60), None)
            pairs = teacher.stream(sequences, targets="top_k:8", ahead=AHEAD)
            wait_until(lambda: next(pairs) and len(teacher.replicas) == 2, "links to both", 30)
            for _ in range(2 * AHEAD):
                next(pairs)
            began = last = time.monotonic()
            longest = 0.0
            thread = threading.Thread(target=fault, args=(fleet, teacher), daemon=True)
            thread.start()
            while last - began < WATCH_S:
                next(pairs)
                now = time.monotonic()
                longest, last = max(longest, now - last), now
            thread.join()
            pairs.close()
    return longest


Fault = Callable[[Fleet, RemoteTeacher], None]


def _kill(fleet: Fleet, teacher: RemoteTeacher) -> None:
    fleet.kill(0)


def _freeze(fleet: Fleet, teacher: RemoteTeacher) -> None:
    fleet.freeze(0)


def _drain(fleet: Fleet, teacher: RemoteTeacher) -> None:
    fleet.replicas[0].stop(signal.SIGTERM)


def _reset(fleet: Fleet, teacher: RemoteTeacher) -> None:
    fleet.proxies[0].reset()


def _reset_alone(fleet: Fleet, teacher: RemoteTeacher) -> None:
    fleet.proxies[1].refuse()
    time.sleep(2.0)
    fleet.proxies[0].reset()


def _cut_alone(fleet: Fleet, teacher: RemoteTeacher) -> None:
    fleet.proxies[1].refuse()
    time.sleep(2.0)
    fleet.proxies[0].hold()
    time.sleep(5.0)
    fleet.proxies[0].release()


STALLS: list[tuple[str, str, Fault]] = [
    ("no fault, longest gap", "", lambda fleet, teacher: None),
    ("SIGKILL with a spare, stall", "2", _kill),
    ("SIGSTOP with a spare, noticed and taken over", "15", _freeze),
    ("SIGTERM with a spare, stall, 0 errors", "2", _drain),
    ("RST with a spare, stall", "2", _reset),
    ("RST alone, stall", "", _reset_alone),
    ("cut of 5 s alone, stall", "5 + 2", _cut_alone),
]


def slots(serve: Serve, folder: Path) -> float:
    """How long a killed client's stream and queued sequences outlive it, in seconds."""
    with Fleet(serve, folder, 1, flags=SMALL_BATCHES, batch_s=BATCH_S) as fleet:
        client = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_CLIENT, fleet.own[0]], stdout=subprocess.PIPE, text=True
        )
        with client:
            assert client.stdout is not None
            client.stdout.readline()
            client.kill()
            began = time.monotonic()
            fleet.assert_nothing_left(60.0)
            return time.monotonic() - began


def stalled_reader(fleet: Fleet, rounds: int) -> tuple[list[float], list[float]]:
    """Growth of the replica in MiB, and the change of another client's throughput in percent."""
    growths, changes = [], []
    sequence = torch.arange(64)
    with StalledReader(fleet.own[0], 50):
        pass
    with connect(fleet.own[0]) as teacher:
        tokens_per_s(teacher, 60, sequence)
        for turn in range(rounds):
            before = fleet.rss_nbytes(0)
            rates = {}
            # Whoever goes first in one turn goes second in the next: other load drifts.
            for stalled in (False, True) if turn % 2 else (True, False):
                if stalled:
                    with StalledReader(fleet.own[0], 800):
                        rates[stalled] = tokens_per_s(teacher, 120, sequence)
                        growths.append((fleet.rss_nbytes(0) - before) / 2**20)
                    fleet.wait_streams(1)
                else:
                    rates[stalled] = tokens_per_s(teacher, 120, sequence)
            changes.append(100 * (rates[True] / rates[False] - 1))
            print(f"growth {growths[-1]:.1f} MiB, change {changes[-1]:.1f} %", file=sys.stderr)
    return growths, changes


if __name__ == "__main__":
    main()
