"""What a service of many replicas costs beside computing: its directory, its cards, its records.

Run `python -m benchmarks.scaling` (two minutes on one core) or with `--quick`. It prints

- ledger: how long the directory takes for what one replica sends it every second, on this disk (one
  transaction and one fsync each): a segment of the journal with the sequences that were answered, and a
  lease request for each team with a quota. `per directory`: replicas, at one round per second each;
- delivered: bytes of the ledger's file for each answered sequence of the last two days, whose keys it keeps;
- cards: the answer to `Describe`, which lists all replicas, and how long one takes to read, on one core. With
  --peers every replica asks every other one once per second; on Ray each shows its card to the others, up to 16
  times per second. `gone after`: how long a replica that died is listed on Ray.
"""

import argparse
import secrets
import statistics
import tempfile
import time
from pathlib import Path

from protos import teacher_pb2
from teacher_server.cluster.membership import MAX_AT_FULL_RATE, MISSED_ROUNDS, ROUND_S
from teacher_server.ledger.directory import FILE_NAME, Directory
from teacher_server.ledger.journal import Kind, Record, to_bytes
from teacher_server.ledger.lease import LeaseRequest
from teacher_server.ledger.sync import SYNC_S

REPLICAS = (1, 16, 100, 1000)
TEAMS = (1, 20)
SEQUENCES = (10, 50)
"""Answered by a replica in one second."""
DAY_S = 86400


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description="What many replicas cost beside computing.")
    parser.add_argument("--rounds", type=int, default=60, help="of the directory, for each line")
    parser.add_argument("--quick", action="store_true", help="few rounds and replicas")
    options = parser.parse_args()
    sizes = REPLICAS[:2] if options.quick else REPLICAS
    rounds = 10 if options.quick else options.rounds
    print_ledger(sizes, rounds)
    print_delivered(rounds)
    print_cards(sizes)


def print_ledger(sizes: tuple[int, ...], rounds: int) -> None:
    """Measures rounds of the directory."""
    print(
        f"{'replicas':>8}  {'teams':>5}  {'sequences':>9}  {'ms/round':>8}  {'p95':>6}  per directory"
    )
    for replicas in sizes:
        for teams in TEAMS:
            for sequences in SEQUENCES:
                times = measure_rounds(replicas, teams, sequences, rounds)
                middle = statistics.median(times)
                print(
                    f"{replicas:8,}  {teams:5}  {sequences:9}  {1e3 * middle:8.2f}"
                    f"  {1e3 * statistics.quantiles(times, n=20)[-1]:6.2f}  {SYNC_S / middle:13,.0f}",
                    flush=True,
                )


def measure_rounds(replicas: int, teams: int, sequences: int, rounds: int) -> list[float]:
    """Returns seconds of rounds of replicas in turn, all of which hold leases."""
    today = int(time.time() // DAY_S)
    request = LeaseRequest(10**12, today, held=0, need=1000, more=1000, active=True)
    requests = {f"team-{number}": request for number in range(teams)}
    times = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Directory(Path(folder) / "ledger")
        for number in range(replicas):
            directory.sync(f"{number:016x}", None, requests)
        for number in range(rounds):
            segment = make_segment(sequences, teams, today)
            began = time.perf_counter()
            directory.sync(f"{number % replicas:016x}", (number + 1, segment), requests)
            times.append(time.perf_counter() - began)
        directory.close()
    return times


def make_segment(sequences: int, teams: int, today: int) -> bytes:
    """Makes what a journal holds after so many sequences were computed and delivered."""
    records = []
    for number in range(sequences):
        team = f"team-{number % teams}"
        records.append(Record(Kind.DISPATCHED, team, today, 1, 2048))
        key = secrets.token_bytes(16)
        records.append(Record(Kind.DELIVERED, team, today, 2047, 80_000, key))
    return b"".join(map(to_bytes, records))


def print_delivered(rounds: int) -> None:
    """Measures how large the ledger becomes."""
    today = int(time.time() // DAY_S)
    sequences = 20_000 if rounds > 10 else 1000
    with tempfile.TemporaryDirectory() as folder:
        directory = Directory(Path(folder) / "ledger")
        for number in range(sequences // 500):
            directory.sync("0" * 16, (number + 1, make_segment(500, 1, today)), {})
        directory.close()
        nbytes = (Path(folder) / "ledger" / FILE_NAME).stat().st_size
    print(f"delivered: {nbytes / sequences:.1f} bytes for each of {sequences:,} sequences\n")


def print_cards(sizes: tuple[int, ...]) -> None:
    """Measures the answer to Describe."""
    print(
        f"{'replicas':>8}  {'bytes':>8}  {'us to read':>10}  {'MB/s with --peers':>17}  {'gone after':>10}"
    )
    for replicas in sizes:
        info = teacher_pb2.TeacherInfo()
        for number in range(replicas):
            address = f"replica-{number}.teacher.lab:50051"
            info.replicas.add(id=secrets.token_hex(16), address=address, state="ready")
        data = info.SerializeToString()
        times = []
        for _ in range(20):
            began = time.perf_counter()
            teacher_pb2.TeacherInfo.FromString(data)
            times.append(time.perf_counter() - began)
        # Each replica answers all others, and reads the answers of all others, every second.
        peers = (replicas - 1) * len(data) / ROUND_S
        gone_s = MISSED_ROUNDS * ROUND_S * max(1.0, replicas / MAX_AT_FULL_RATE)
        print(
            f"{replicas:8,}  {len(data):8,}  {1e6 * statistics.median(times):10,.0f}"
            f"  {peers / 1e6:17,.2f}  {gone_s:8,.0f} s"
        )


if __name__ == "__main__":
    main()
