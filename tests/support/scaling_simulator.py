"""Trainers, replicas and the policy that scales them, in virtual time.

Trainers of a burst start and stop together. Each keeps a bounded window of batches requested or not used
yet, and uses one per step: a teacher that is too slow makes them slow, and no queue grows without bound.
The window is a number of batches, or what the trainer uses in 30 s, as with `ahead="30s"`: more than that
until its first answer has come, and then by the pace at which it gets on. Replicas queue so many tokens and
refuse more. They load for a while, compute at rates that differ and waver, say what waits at them every few
seconds, which arrives later, and die. Tokens flow: single requests are not followed.

The policy is what is tested, so nothing here knows how it decides: it is called every second with what the
replicas have said so far.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from student_trainer.teachers.look_ahead import (
    FIRST_INTERVAL_S,
    FIRST_ITEMS,
    KEPT,
    MAX_UNMEASURED,
    MIN_ITEMS,
)
from teacher_server.cluster.autoscaling import Fleet, Load

BUSY_S = 20
"""Replicas say how busy they were in this time, as production does."""
AHEAD_S = 30.0
FOUND_S = 3.0
"""Trainers send to a new replica after this time."""
MISSED_S = 4.0
"""After this time a replica that has died is replaced."""
DRAIN_S = 60.0

Policy = Callable[[Fleet, Any], tuple[int, Any]]
"""Takes the replicas as they are now and the state it returned last, None at first."""


@dataclass(frozen=True)
class Burst:
    """Trainers that start and stop together."""

    start_s: float
    end_s: float
    trainers: int
    step_s: float
    batch_tokens: int
    window: int | None = None
    """Batches that a trainer asks for ahead of its step; None: what it uses in 30 s."""
    stagger_s: float = 20.0
    """The first trainer starts so long before the last."""
    pause_every_s: float = math.inf
    pause_s: float = 0.0
    """All trainers stop for a checkpoint or an evaluation every now and then."""

    def active(self, now: float) -> float:
        """Trainers that run now."""
        if not self.start_s <= now < self.end_s:
            return 0.0
        return self.trainers * min(1.0, (now - self.start_s + 1) / max(1.0, self.stagger_s))

    def is_paused(self, now: float) -> bool:
        age = now - self.start_s
        return age > self.pause_every_s and age % self.pause_every_s < self.pause_s

    def tokens_per_s(self, now: float) -> float:
        """What they use if they never wait for the teacher."""
        if self.is_paused(now):
            return 0.0
        return self.active(now) * self.batch_tokens / self.step_s


@dataclass(frozen=True)
class World:
    """What the policy cannot choose."""

    bursts: Sequence[Burst]
    end_s: float
    tokens_per_s: float = 33_000.0
    """Of one replica."""
    loading_s: float = 90.0
    rate_noise: float = 0.1
    """Relative spread of what replicas compute, and of what they measure."""
    report_every_s: float = 2.0
    report_delay_s: float = 1.0
    deaths_per_hour: float = 0.0
    """Of each replica."""
    max_queued_tokens: int = 1 << 20
    """At one replica."""
    min_replicas: int = 1
    max_replicas: int = 16
    seed: int = 0


@dataclass(eq=False)
class _Replica:
    name: str
    ready_s: float
    rate: float
    phase_s: float
    queue: float = 0.0
    waver: float = 0.0
    busy: deque[float] = field(default_factory=lambda: deque(maxlen=BUSY_S))
    sent: deque[tuple[float, Load]] = field(default_factory=deque)
    """Reports on their way."""
    said: Load | None = None
    lost_s: float = math.inf
    """When it died."""
    stopping_s: float = math.inf


class Second(NamedTuple):
    """What was the case in one second."""

    demand: float
    """Replicas that the trainers would keep busy if they never waited."""
    target: int
    ready: int
    held: int
    """Replicas that occupy a machine: loading, ready or draining."""
    queue_s: float
    """What is queued at all replicas, over what those that are ready compute in a second."""
    used: float
    """Replicas' worth of tokens that trainers used."""
    rate: float
    """What the ready replicas compute at most, in replicas' worth."""


class _Crowd:
    """The trainers of one burst."""

    def __init__(self, burst: Burst, max_tokens: float) -> None:
        """max_tokens: what one of them may have asked for."""
        self.burst = burst
        self._max_tokens = max_tokens
        self.asked = 0.0
        """Tokens at the replicas."""
        self.unused = 0.0
        """Tokens that were answered and not used."""
        self._used = 0.0
        """Batches that one trainer has used."""
        self._pace = 1 / FIRST_INTERVAL_S
        """Batches that a trainer uses in a second, waiting included; its client begins with a guess."""
        self._window = 0.0 if burst.window is None else float(burst.window)

    def train(self, now: float) -> float:
        """Trains for a second; returns how many tokens that used."""
        active = self.burst.active(now)
        if not active:
            self.asked = self.unused = 0.0
            return 0.0
        tokens = min(self.unused, self.burst.tokens_per_s(now))
        self.unused -= tokens
        if self.burst.window is None:
            self._look_ahead(tokens / active / self.burst.batch_tokens)
        return tokens

    def answer(self, tokens: float) -> None:
        """Gives them what was computed for them."""
        self.asked -= min(self.asked, tokens)
        self.unused += tokens

    def room(self, now: float) -> float:
        """Tokens that they would ask for now."""
        window = min(self._window * self.burst.batch_tokens, self._max_tokens)
        return max(0.0, self.burst.active(now) * window - self.asked - self.unused)

    def _look_ahead(self, used: float) -> None:
        """Does what look_ahead.py does: `used` batches were used in this second."""
        self._used += used
        if self._used < 1:
            self._window = min(MAX_UNMEASURED, max(FIRST_ITEMS, 2 * self._window))
            return
        if used > 0:
            self._pace += min(1.0, (1 - KEPT) * used) * (used - self._pace)
        self._window = max(MIN_ITEMS, min(self._window + used, AHEAD_S * self._pace))


class ScalingSimulation:
    """Runs a world under a policy; `seconds` has what happened."""

    def __init__(self, world: World, policy: Policy) -> None:
        self.world = world
        self.seconds: list[Second] = []
        self._policy = policy
        self._random = random.Random(world.seed)
        self._crowds = [
            _Crowd(burst, world.min_replicas * world.max_queued_tokens / 2)
            for burst in world.bursts
        ]
        self._replicas: list[_Replica] = []
        self._stopping: list[_Replica] = []
        self._count = 0
        self.target = world.min_replicas
        for _ in range(world.min_replicas):
            self._start(0.0)
            self._replicas[-1].ready_s = 0.0

    def run(self) -> "ScalingSimulation":
        state: Any = None
        for second in range(int(self.world.end_s)):
            now = float(second)
            self._advance(now)
            decided, state = self._policy(self._fleet(now), state)
            self._scale(decided, now)
        return self

    def _start(self, now: float) -> None:
        world, draw = self.world, self._random
        self._count += 1
        self._replicas.append(
            _Replica(
                name=f"r{self._count}",
                ready_s=now + world.loading_s * draw.uniform(0.9, 1.15),
                rate=world.tokens_per_s * math.exp(draw.gauss(0.0, world.rate_noise / 2)),
                phase_s=draw.uniform(0.0, world.report_every_s),
            )
        )

    def _fleet(self, now: float) -> Fleet:
        for replica in self._replicas:
            while replica.sent and replica.sent[0][0] <= now:
                replica.said = replica.sent.popleft()[1]
        return Fleet(
            now_s=now,
            target=self.target,
            loads={r.name: r.said for r in self._replicas if r.ready_s <= now},
            min_replicas=self.world.min_replicas,
            max_replicas=self.world.max_replicas,
        )

    def _scale(self, decided: int, now: float) -> None:
        self.target = decided
        while len(self._replicas) < decided:
            self._start(now)
        while len(self._replicas) > decided:
            # Serve stops those first that do not run yet.
            victim = max(self._replicas, key=lambda r: (r.ready_s > now, self._random.random()))
            self._replicas.remove(victim)
            if victim.ready_s <= now:
                victim.stopping_s = now
                self._stopping.append(victim)

    def _advance(self, now: float) -> None:
        """Lets a second pass."""
        self._lose(now)
        crowds = [crowd for crowd in self._crowds if crowd.asked or crowd.burst.active(now)]
        used = sum(crowd.train(now) for crowd in crowds)
        alive = [r for r in self._replicas if r.ready_s <= now and r.lost_s == math.inf]
        self._forget_departed(crowds)
        self._ask(now, [r for r in alive if r.ready_s + FOUND_S <= now] or alive, crowds)
        computed = sum(self._compute(replica, now) for replica in (*alive, *self._stopping))
        asked = sum(crowd.asked for crowd in crowds)
        for crowd in crowds:
            crowd.answer(computed * crowd.asked / asked if asked else 0.0)
        self._stopping = [r for r in self._stopping if r.queue > 0 and now - r.stopping_s < DRAIN_S]
        rates = sum(r.rate for r in alive)
        queued = sum(replica.queue for replica in (*alive, *self._stopping))
        per_replica = self.world.tokens_per_s
        self.seconds.append(
            Second(
                demand=sum(crowd.burst.tokens_per_s(now) for crowd in crowds) / per_replica,
                target=self.target,
                ready=len(alive),
                held=len(self._replicas) + len(self._stopping),
                queue_s=queued / (rates or per_replica),
                used=used / per_replica,
                rate=rates / per_replica,
            )
        )

    def _forget_departed(self, crowds: Sequence[_Crowd]) -> None:
        """Empties the queues of what trainers do not want any more."""
        queued = sum(r.queue for r in (*self._replicas, *self._stopping))
        asked = sum(crowd.asked for crowd in crowds)
        if queued > asked:
            for replica in (*self._replicas, *self._stopping):
                replica.queue *= asked / queued

    def _ask(self, now: float, replicas: Sequence[_Replica], crowds: Sequence[_Crowd]) -> None:
        """Sends requests to those replicas that have the least."""
        rooms = [crowd.room(now) for crowd in crowds]
        total = left = sum(rooms)
        if total <= 0 or not replicas:
            return
        ordered = sorted(replicas, key=lambda r: r.queue)
        held = 0.0
        for index, replica in enumerate(ordered, start=1):
            held += replica.queue
            level = (held + left) / index
            if index == len(ordered) or level <= ordered[index].queue:
                level = min(level, self.world.max_queued_tokens)
                for one in ordered[:index]:
                    left -= max(0.0, level - one.queue)
                    one.queue = max(one.queue, level)
                break
        for crowd, room in zip(crowds, rooms, strict=True):
            crowd.asked += room * (1 - max(0.0, left) / total)

    def _compute(self, replica: _Replica, now: float) -> float:
        """Computes for a second; returns how many tokens."""
        noise, gauss = self.world.rate_noise, self._random.gauss
        if not replica.queue:
            tokens, rate = 0.0, replica.rate
        else:
            replica.waver = 0.95 * replica.waver + gauss(0.0, 0.3 * noise)
            rate = replica.rate * math.exp(replica.waver)
            tokens = min(rate, replica.queue)
            replica.queue -= tokens
        replica.busy.append(tokens / rate)
        if (now + replica.phase_s) % self.world.report_every_s < 1.0:
            measured = rate * math.exp(gauss(0.0, noise))
            load = Load(replica.queue / measured, sum(replica.busy) / len(replica.busy))
            delay_s = self.world.report_delay_s * self._random.uniform(0.2, 1.0)
            replica.sent.append((now + delay_s, load))
        return tokens

    def _lose(self, now: float) -> None:
        """Lets replicas die, and be replaced a little later."""
        chance = self.world.deaths_per_hour / 3600
        if not chance:
            return
        for replica in list(self._replicas):
            if replica.lost_s == math.inf and self._random.random() < chance:
                replica.lost_s, replica.queue, lost = now, 0.0, replica.queue
                asked = sum(crowd.asked for crowd in self._crowds)
                left = max(0.0, 1 - lost / asked) if asked else 0.0
                for crowd in self._crowds:  # they ask others
                    crowd.asked *= left
            if now - replica.lost_s >= MISSED_S:
                self._replicas.remove(replica)
                if len(self._replicas) < self.target:
                    self._start(now)
