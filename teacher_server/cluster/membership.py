"""Keeps track of the other replicas of a service by the cards that they exchange.

How cards travel is the caller's business: on Ray, app.py carries them through Serve.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from logitstream.connection import is_loopback
from protos import teacher_pb2

if (
    TYPE_CHECKING
):  # it loads the model's libraries, and Serve reads this file in other processes too
    from teacher_server.replica import Replica

ROUND_S = 1.0
"""How often a replica shows its card to the others, up to MAX_AT_FULL_RATE of them; then less often."""
MAX_AT_FULL_RATE = 16
MISSED_ROUNDS = 5
"""Missed rounds after which a replica is dropped."""

Card = tuple[bytes, str]
"""A serialized `teacher_pb2.Replica`, empty while it is loading, and the address of its machine."""
Exchange = Callable[[Card, float], Awaitable[list[Card]]]
"""(own card, seconds) -> cards: shows a card to all replicas, and returns those that answer in time."""


class Membership:
    """The replicas whose cards arrived within the last MISSED_ROUNDS rounds."""

    def __init__(
        self, machine: str, exchange: Exchange, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """machine: the address of this one, as the other replicas see it."""
        self._machine = machine
        self._exchange = exchange
        self._clock = clock
        self._cards: dict[str, tuple[float, teacher_pb2.Replica]] = {}
        """By id: when a card arrived last, and the card. The own one comes back with the others."""
        self._round_s = ROUND_S
        self._replica: Replica | None = None

    def attach(self, replica: "Replica") -> None:
        """From now on shows the card of this process's replica, which is ready, and keeps it informed."""
        self._replica = replica

    def card(self) -> Card:
        """Returns the card of this process's replica, which is empty before `attach`."""
        if self._replica is None:
            return b"", self._machine
        return self._replica.card().SerializeToString(), self._machine

    def cards(self) -> list[teacher_pb2.Replica]:
        """Returns the cards that arrived within the last rounds."""
        return [card for _, card in self._cards.values()]

    def addresses(self) -> list[str]:
        """Returns the addresses of the known replicas, this one's first; none while it is loading."""
        if self._replica is None:
            return []
        own = self._replica.card().address
        others = (card.address for card in self.cards())
        return [own, *(address for address in others if address != own)]

    def receive(self, data: bytes, machine: str) -> None:
        """Takes note of the card of another replica."""
        card = teacher_pb2.Replica.FromString(data)
        host = card.address.rpartition(":")[0]
        # A loopback address of another machine leads nowhere from here.
        if card.id and (machine == self._machine or not is_loopback(host)):
            self._cards[card.id] = self._clock(), card
        self._update_replica()

    async def run(self) -> None:
        """Exchanges cards for ever."""
        while True:
            await self.announce()
            # Every replica sends to every other one, so large services send less often.
            self._round_s = ROUND_S * max(1.0, len(self._cards) / MAX_AT_FULL_RATE)
            await asyncio.sleep(self._round_s)

    async def announce(self) -> None:
        """Shows the own card to all others, and takes theirs as far as they answer in time.

        One frozen replica makes the answers of all others be lost with its own. Their cards arrive
        all the same, when they announce themselves.
        """
        for card in await self._exchange(self.card(), self._round_s):
            self.receive(*card)
        self._update_replica()

    def _update_replica(self) -> None:
        """Drops replicas whose cards stopped coming, and tells the own replica of the rest."""
        oldest = self._clock() - MISSED_ROUNDS * self._round_s
        self._cards = {id_: seen for id_, seen in self._cards.items() if seen[0] >= oldest}
        if self._replica is not None:
            self._replica.set_others(self.cards())
