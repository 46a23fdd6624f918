"""Which replicas count as members, without Ray; tests/ray has replicas exchange their cards."""

import asyncio
import contextlib

from protos import teacher_pb2
from teacher_server.cluster.membership import (
    MAX_AT_FULL_RATE,
    MISSED_ROUNDS,
    ROUND_S,
    Card,
    Membership,
)

MACHINE = "10.0.0.1"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def card(id_: str, address: str) -> bytes:
    return teacher_pb2.Replica(id=id_, address=address, state="ready").SerializeToString()


async def nothing(own: Card, timeout_s: float) -> list[Card]:
    return []


def ids(membership: Membership) -> list[str]:
    return sorted(replica.id for replica in membership.cards())


def test_a_replica_is_dropped_after_its_cards_stopped_coming():
    clock = Clock()
    membership = Membership(MACHINE, nothing, clock=clock)
    membership.receive(card("a", "10.0.0.1:1"), MACHINE)
    clock.now += (MISSED_ROUNDS - 1) * ROUND_S
    membership.receive(card("b", "10.0.0.2:1"), "10.0.0.2")
    assert ids(membership) == ["a", "b"]
    clock.now += 2 * ROUND_S
    asyncio.run(membership.announce())
    assert ids(membership) == ["b"]


def test_a_loopback_address_counts_on_its_own_machine_only():
    membership = Membership(MACHINE, nothing)
    membership.receive(card("here", "127.0.0.1:1"), MACHINE)
    membership.receive(card("there", "127.0.0.1:1"), "10.0.0.2")
    assert ids(membership) == ["here"]


def test_a_replica_that_is_loading_has_no_card_and_collects_those_of_others():
    async def others(own: Card, timeout_s: float) -> list[Card]:
        assert own == (b"", MACHINE)
        assert timeout_s == ROUND_S
        return [(b"", "10.0.0.2"), (card("c", "10.0.0.3:1"), "10.0.0.3")]

    membership = Membership(MACHINE, others)
    asyncio.run(membership.announce())
    assert ids(membership) == ["c"]
    assert membership.addresses() == []


def test_many_replicas_send_less_often():
    timeouts: list[float] = []

    async def many(own: Card, timeout_s: float) -> list[Card]:
        timeouts.append(timeout_s)
        if len(timeouts) == 2:
            raise asyncio.CancelledError
        count = 2 * MAX_AT_FULL_RATE
        return [(card(f"r{n}", f"10.0.0.{n}:1"), f"10.0.0.{n}") for n in range(count)]

    async def two_rounds() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await Membership(MACHINE, many).run()

    asyncio.run(two_rounds())
    assert timeouts == [ROUND_S, 2 * ROUND_S]
