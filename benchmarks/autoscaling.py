"""How replicas follow bursts of trainers: the policy by seconds of queue, and the one before it.

Run `python -m benchmarks.autoscaling`; it prints a table and draws docs/autoscaling.png. The production policy
(teacher_server/cluster/autoscaling.py) decides in virtual time (tests/support/scaling_simulator.py) over worlds of
several kinds, drawn by seeds (tests/support/scaling_scenarios.py), in which a replica takes 90 s to load. Exits
with 1 if a run misses a bound: two changes of direction in a burst (four if replicas die), a queue whose
95th percentile is twice the loading time, five minutes after which idle replicas are gone. The numbers are
the same on every machine.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from teacher_server.cluster.autoscaling import Settings, decide
from teacher_server.config import ServeConfig
from tests.support.scaling_scenarios import (
    BURSTS,
    KINDS,
    ByWaitingTokens,
    Kind,
    Verdict,
    find_misses,
    judge,
    make_world,
)
from tests.support.scaling_simulator import Policy, ScalingSimulation, World

DRAWN: tuple[Kind, int] = ("look-ahead 30s", 4)
"""The world of the picture."""


def main() -> int:
    """Simulates, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description="Autoscaling in virtual time.")
    parser.add_argument("--worlds", type=int, default=25, help="of each kind, four bursts each")
    parser.add_argument("--picture", type=Path, default=Path("docs/autoscaling.png"))
    parser.add_argument("--max-queued-tokens", type=int, default=1 << 20, help="at a replica")
    for name in ("target_queue_s", "scale_up_after_s", "scale_down_after_s"):
        default = ServeConfig.model_fields[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default)
    options = parser.parse_args()
    settings = Settings(
        options.target_queue_s, options.scale_up_after_s, options.scale_down_after_s
    )
    policies: dict[str, Callable[[World], Policy]] = {
        "seconds of queue": lambda _: partial(decide, settings),
        "waiting tokens": ByWaitingTokens,
    }
    print(
        f"{options.worlds} worlds of each kind, {BURSTS} bursts in each; the worst of each column"
    )
    print(
        f"{'':18}{'':24}{'turns of':>9}{'queue p95':>11}{'idle':>7}{'surplus':>9}"
        f"{'replica-hours':>15}{'trainers':>10}{'worlds out':>12}"
    )
    print(
        f"{'':18}{'':24}{'a burst':>9}{'s':>11}{'s':>7}{'s':>9}{'of the best':>15}"
        f"{'speed':>10}{'of bounds':>12}"
    )
    missed = 0
    for name, make in policies.items():
        for kind in KINDS:
            drawn = (make_world(kind, seed) for seed in range(options.worlds))
            worlds = [replace(one, max_queued_tokens=options.max_queued_tokens) for one in drawn]
            verdicts = [judge(ScalingSimulation(world, make(world)).run()) for world in worlds]
            misses = sum(bool(find_misses(*pair)) for pair in zip(worlds, verdicts, strict=True))
            missed += misses if name == "seconds of queue" else 0
            print_row(name, kind, verdicts, misses)
    draw(policies, options.picture)
    return 1 if missed else 0


def print_row(name: str, kind: str, verdicts: list[Verdict], misses: int) -> None:
    """Prints the worst of each number; of hours and speed, the mean."""
    hours = sum(v.replica_hours for v in verdicts) / sum(v.best_hours for v in verdicts)
    print(
        f"{name:18}{kind:24}{max(v.turns for v in verdicts):9}"
        f"{max(v.queue_p95_s for v in verdicts):11.0f}{max(v.idle_s for v in verdicts):7.0f}"
        f"{max(v.surplus_s for v in verdicts):9.0f}{hours:15.2f}"
        f"{sum(v.speed for v in verdicts) / len(verdicts):10.0%}{misses:12}"
    )


def draw(policies: dict[str, Callable[[World], Policy]], path: Path) -> None:
    """Replicas and queue over time in one world, a column per policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    world = make_world(*DRAWN)
    figure, axes = plt.subplots(
        2, len(policies), figsize=(10, 4.6), layout="constrained", sharex=True, sharey="row"
    )
    for column, (name, make) in enumerate(policies.items()):
        seconds = ScalingSimulation(world, make(world)).run().seconds
        minutes = [index / 60 for index in range(len(seconds))]
        replicas, queue = axes[0][column], axes[1][column]
        demand = [second.demand for second in seconds]
        replicas.fill_between(minutes, demand, color="#d9d9d9", label="trainers could keep busy")
        replicas.plot(minutes, [s.held for s in seconds], color="#c44e52", lw=1, label="held")
        replicas.plot(minutes, [s.ready for s in seconds], color="#4c72b0", lw=1, label="ready")
        replicas.set_title(f"by {name}")
        queue.plot(minutes, [second.queue_s for second in seconds], color="#55a868", lw=1)
        queue.set_xlabel("minutes")
    axes[0][0].set_ylabel("replicas")
    axes[1][0].set_ylabel("queue, seconds")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(main())
