"""What a flood does to others: a FIFO queue, fairness among credentials, fairness among teams.

Run `python -m benchmarks.fairness`; it prints two tables and draws docs/fairness.png. One replica in
virtual time (tests/support/simulator.py drives the production scheduler): a team that floods
it with 20 credentials, two trainers of weight 1 and 3, and a light team that asks for one sequence
three times a second. A wait ends when the batch with the sequence begins to be computed. The second
table is how long a light team waits for its answers beside the other three, by what it asks for. These numbers are the same on every machine; with `--live` there
is a third table, of a real replica (benchmarks/latency.py).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.latency import measure
from teacher_server.scheduling.job import BULK, INTERACTIVE, TRAINING
from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.teams.declaration import Team
from tests.support.simulator import (
    Closed,
    Fifo,
    Identify,
    Open,
    Queue,
    Simulation,
    by_credential,
    by_team,
    sizes,
)

SECONDS = 60.0
MIXED = (64, 128, 192, 256, 384, 512)
FLOOD = Team("flood", weight=1.0)
TRAINERS = (Team("trainer", weight=1.0), Team("large trainer", weight=3.0))
LIGHT = Team("light", weight=1.0)
QUEUES: dict[str, tuple[Callable[..., Queue], Identify]] = {
    "FIFO": (Fifo, by_team),
    "fair among credentials": (Scheduler, by_credential),
    "fair among teams": (Scheduler, by_team),
}


def main() -> None:
    """Simulates, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description="A flooding team and three others, simulated.")
    parser.add_argument("--picture", type=Path, default=Path("docs/fairness.png"))
    parser.add_argument("--live", action="store_true", help="measure a real replica too")
    options = parser.parse_args()
    runs = {name: simulate(*queue) for name, queue in QUEUES.items()}
    print(f"{'':24} {'cost/s':>8}   share of what was dispatched{'':13}wait of the light team, s")
    names = [team.name for team in (FLOOD, *TRAINERS, LIGHT)]
    print(f"{'':24} {'':8}   " + "".join(f"{name:>15}" for name in names) + "   median    worst")
    for name, run in runs.items():
        shares = "".join(f"{run.dispatched(team) / run.total():15.1%}" for team in names)
        waits = sorted(run.starts["light"])
        print(
            f"{name:24} {run.total() / SECONDS:8,.0f}   {shares}   {waits[len(waits) // 2]:6.2f} "
            f"{waits[-1]:8.2f}"
        )
    # The light team asks for less than its part; the others divide what it leaves.
    run = runs["fair among teams"]
    light = run.dispatched(LIGHT.name) / run.total()
    weights = [team.weight for team in (FLOOD, *TRAINERS)]
    entitled = [(1 - light) * weight / sum(weights) for weight in weights]
    print(f"{'by their weights':36}" + "".join(f"{share:15.1%}" for share in (*entitled, light)))
    show_latencies()
    draw(runs, options.picture)
    if options.live:
        print()
        measure()


def show_latencies() -> None:
    """How long the light team waits for its answers, per kind of request."""
    print(f"\n{'a light team asks for':36}{'p50, s':>10}{'p99, s':>10}{'worst, s':>10}")
    for level, name in ((BULK, "bulk"), (TRAINING, "training"), (INTERACTIVE, "interactive")):
        for count in (1, 12):
            run = Simulation()
            busy(run)
            Open(run, LIGHT, sizes(128), period_s=1.7, count=count, level=level)
            waits = sorted(run.run(SECONDS).latencies["light"])
            title = f"{count} {'sequence' if count == 1 else 'sequences'} at a time, {name}"
            marks = (waits[len(waits) // 2], waits[int(0.99 * len(waits))], waits[-1])
            print(f"{title:36}" + "".join(f"{mark:10.3f}" for mark in marks))


def simulate(make: Callable[..., Queue], identify: Identify) -> Simulation:
    """One minute of the four teams."""
    run = Simulation(make, identify=identify)
    busy(run)
    Open(run, LIGHT, sizes(128), period_s=1 / 3)
    return run.run(SECONDS)


def busy(run: Simulation) -> None:
    """The three teams that always have work."""
    Closed(run, FLOOD, sizes(*MIXED, seed=0), window=2000, credentials=20)
    for seed, trainer in enumerate(TRAINERS, start=1):
        Closed(run, trainer, sizes(*MIXED, seed=seed), window=100)


def draw(runs: dict[str, Simulation], path: Path) -> None:
    """Shares of cost beside waits of the light team, one bar and one line per queue."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    teams = [FLOOD, *TRAINERS, LIGHT]
    colors = ["#c44e52", "#8fa9cf", "#4c72b0", "#55a868"]
    figure, (shares, waits) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for row, (name, run) in enumerate(runs.items()):
        left = 0.0
        for team, color in zip(teams, colors, strict=True):
            share = run.dispatched(team.name) / run.total()
            label = f"{team.name} (weight {team.weight:g})" if row == 0 else None
            shares.barh(row, share, left=left, color=color, label=label)
            if share > 0.055:
                shares.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center")
            left += share
        ordered = sorted(run.starts["light"])
        fractions = [(index + 1) / len(ordered) for index in range(len(ordered))]
        waits.step([max(wait, 1e-3) for wait in ordered], fractions, where="post", label=name)
    shares.set_yticks(range(len(runs)), list(runs))
    shares.invert_yaxis()
    shares.set_xlim(0, 1)
    shares.set_xlabel("share of the dispatched cost")
    shares.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=2, frameon=False)
    waits.set_xscale("log")
    waits.set_xlabel("wait of the light team, seconds")
    waits.set_ylabel("of its sequences, up to")
    waits.set_xlim(left=2e-4)
    waits.legend(frameon=False)
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
