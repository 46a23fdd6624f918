"""What crowds of strangers cost a shared service, and the one client that works there.

Run `python -m benchmarks.edge` (`--count 1000` connections of each kind by default, `--kinds` for some of
them). One replica of a tiny Gemma 2 on the CPU with teams, in plain text; the strangers have no token,
run at the lowest priority, and do what `tests/support/crowd.py` says of their kind. The good client was
there before them, and asks for one sequence after the other.

*load* is the 99th percentile of its times while as many processes as there are cores count up at the
lowest priority, asked of nobody: what the strangers' own use of the machine costs. *growth* is that of
the replica's resident set while the strangers are there, *connect* how long another client takes to
connect then, *files* how many more files than before the replica has open 2 s after they have gone.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from student_trainer import RemoteTeacher, TeacherUnavailable, connect
from tests.conftest import services
from tests.faults.test_crowds import crowd
from tests.support import tiny
from tests.support.crowd import KINDS
from tests.support.teams import add_team

VOCAB = 1001
TIMES = 150
GIVE_UP_S = 60.0
SEQUENCES = tiny.random_sequences(16, VOCAB, seed=41)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="What strangers cost a service and its client.")
    parser.add_argument("--count", type=int, default=1000, help="connections of each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        serve = stack.enter_context(services(Path(folder)))
        teams = Path(folder) / "teams.toml"
        token = add_team(teams, "good")
        model = tiny.save_model(Path(folder) / "model", "Gemma2", VOCAB)
        served = serve(model, "--teams", str(teams), "--threads", "1")
        pid = served.process.pid
        files = Path(f"/proc/{pid}/fd")

        def resident_mib() -> float:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

        teacher = stack.enter_context(connect(served.address, token=token))
        times(teacher)
        p50, p99 = times(teacher)
        print(f"{'':20}{'p50 ms':>8}{'p99 ms':>8}{'connect s':>11}{'growth MiB':>12}{'files':>7}")
        print(f"{'nobody else':20}{p50:>8.1f}{p99:>8.1f}")
        with burners():
            p50, p99 = times(teacher)
        print(f"{'load':20}{p50:>8.1f}{p99:>8.1f}", flush=True)
        for kind in options.kinds:
            before, opened = resident_mib(), len(list(files.iterdir()))
            with crowd(kind, options.count, served.address):
                p50, p99 = times(teacher)
                growth = resident_mib() - before
                connected_s = time_to_connect(served.address, token)
            time.sleep(2.0)
            more = len(list(files.iterdir())) - opened
            print(
                f"{kind:20}{p50:>8.1f}{p99:>8.1f}{connected_s:>11.2f}{growth:>12.0f}{more:>7}",
                flush=True,
            )


def times(teacher: RemoteTeacher) -> tuple[float, float]:
    """The median and the 99th percentile, in ms, of one sequence asked for after the other."""
    found = []
    for number in range(TIMES):
        began = time.perf_counter()
        list(teacher.stream([SEQUENCES[number % len(SEQUENCES)]], targets="sampled:16"))
        found.append(1e3 * (time.perf_counter() - began))
    found = sorted(found[5:])
    return found[len(found) // 2], found[int(0.99 * len(found))]


def time_to_connect(address: str, token: str) -> float:
    """Seconds until another client is connected, which gives up after a minute."""
    began = time.perf_counter()
    while True:
        with suppress(TeacherUnavailable), connect(address, token=token):
            return time.perf_counter() - began
        if time.perf_counter() - began > GIVE_UP_S:
            return math.inf


@contextmanager
def burners() -> Iterator[None]:
    """One process per core that counts up at the lowest priority."""
    count_up = "import os; os.nice(19)\nwhile True: pass"
    processes = [
        subprocess.Popen([sys.executable, "-c", count_up]) for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
