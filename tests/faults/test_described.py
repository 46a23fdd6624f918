"""Answers to Describe with flipped bits: a run is built on the first one, and ended by later ones."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch

from logit_codec import fit_id_table, tokenizer_fingerprint
from protos import teacher_pb2
from student_trainer import ProtocolError, connect
from tests.support import tiny
from tests.support.fleet import Fleet
from tests.support.oracle import VOCAB, digest, within
from tests.support.relay import Relay

SEQUENCES = tiny.random_sequences(6, VOCAB, seed=14)
TOKENIZER = tiny.make_tokenizer(["a", "b"])
VOLATILE = {"replicas", "replica_id", "caller.tokens_left_today"}
"""What may differ between two answers of one service, or ends nothing if it is damaged."""

Damage = Callable[[teacher_pb2.TeacherInfo], None]


@pytest.fixture(scope="module")
def relay(fleet: Fleet) -> Iterator[Relay]:
    with Relay(fleet.own[0]) as relay:
        yield relay


@pytest.fixture(scope="module")
def wanted(fleet: Fleet) -> list[str]:
    with connect(fleet.own[0]) as teacher:
        return [digest(targets) for _, targets in teacher.stream(SEQUENCES)]


def lasting(info: teacher_pb2.TeacherInfo) -> bytes:
    """All but what may differ between two answers."""
    kept = teacher_pb2.TeacherInfo()
    kept.CopyFrom(info)
    for name in ("replicas", "replica_id"):
        kept.ClearField(name)
    kept.caller.ClearField("tokens_left_today")
    return kept.SerializeToString(deterministic=True)


def paths(descriptor: Any, prefix: str = "") -> Iterator[str]:
    for field in descriptor.fields:
        path = prefix + field.name
        if path in VOLATILE:
            continue
        if field.type == field.TYPE_MESSAGE:
            yield from paths(field.message_type, f"{path}.")
        else:
            yield path


def flipped(path: str) -> Damage:
    """Changes one bit of a field, or gives one to a field that has none."""

    def other(value: Any) -> Any:
        if isinstance(value, float):
            return value * 2 + 1
        if isinstance(value, str):
            return chr(ord(value[0]) ^ 1) + value[1:] if value else "a"
        if isinstance(value, bytes):
            return bytes([value[0] ^ 1]) + value[1:]
        return value ^ 1

    def damage(info: teacher_pb2.TeacherInfo) -> None:
        *parents, name = path.split(".")
        message: Any = info
        for parent in parents:
            message = getattr(message, parent)
        value = getattr(message, name)
        if not hasattr(value, "append"):
            setattr(message, name, other(value))
        elif value:
            value[0] = other(value[0])
        else:
            value.append(bytes(16) if name == "id_tables" else "a")

    return damage


def damaging(*damages: Damage | None) -> Damage:
    """Of the next answers; all have the fingerprint of TOKENIZER, which the model has not."""
    waiting = list(damages)

    def damage(info: teacher_pb2.TeacherInfo) -> None:
        info.tokenizer_fingerprint = tokenizer_fingerprint(TOKENIZER)
        if waiting and (next_one := waiting.pop(0)) is not None:
            next_one(info)

    return damage


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("path", list(paths(teacher_pb2.TeacherInfo.DESCRIPTOR)))
def test_a_flipped_bit_in_the_first_description_is_not_believed(
    fleet: Fleet, relay: Relay, wanted: list[str], path: str, place: int
):
    truth = fleet.describe(0)
    damaging()(truth)
    damages: list[Damage | None] = [None, None]
    damages[place] = flipped(path)
    relay.described = damaging(*damages)
    with connect(relay.address, tokenizer=TOKENIZER) as teacher:
        assert lasting(teacher.info) == lasting(truth)
        pairs = teacher.stream(SEQUENCES)
        assert within(30, lambda: [digest(targets) for _, targets in pairs]) == wanted


def test_three_descriptions_that_all_differ_are_an_error_that_says_so(relay: Relay):
    relay.described = damaging(flipped("vocab_size"), None, flipped("service_id"))
    with pytest.raises(ProtocolError, match=f"{relay.address}.*three different.*TLS"):
        connect(relay.address)


@pytest.mark.parametrize("path", ["teacher_fingerprint", "service_id"])
def test_a_flipped_bit_in_the_description_of_a_second_address_does_not_end_the_run(
    fleet: Fleet, relay: Relay, path: str
):
    relay.described = damaging()
    with Relay(fleet.own[0]) as second:
        second.described = damaging(flipped(path))
        with connect([relay.address, second.address]) as teacher:
            assert lasting(teacher.info)


@pytest.mark.parametrize("path", ["teacher_fingerprint", "service_id", "limits.max_queued_tokens"])
def test_a_flipped_bit_in_a_description_after_a_lost_stream_changes_nothing(
    relay: Relay, wanted: list[str], path: str
):
    relay.described = damaging()
    with connect(relay.address) as teacher:
        before = lasting(teacher.info)
        relay.refuse = [grpc.StatusCode.UNAVAILABLE]
        teacher._session._keeper.discovery._failures.clear()
        for link in list(teacher._session._keeper.links.values()):
            teacher._io.call(teacher._session._keeper._lose, link, "lost for the test")
        relay.described = damaging(flipped(path))
        pairs = teacher.stream(SEQUENCES)
        assert within(30, lambda: [digest(targets) for _, targets in pairs]) == wanted
        assert teacher._session._keeper.discovery.info is not None
        assert lasting(teacher._session._keeper.discovery.info) == before


@pytest.mark.parametrize("how", ["damaged", "no message"])
def test_an_id_table_that_arrives_damaged_is_asked_for_again(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path, how: str
):
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path))
    table = fit_id_table(torch.arange(VOCAB, 0, -1), VOCAB)
    data = table.to_bytes()

    def with_table(info: teacher_pb2.TeacherInfo) -> None:
        info.id_tables[:] = [table.digest]

    relay.described = with_table
    if how == "damaged":
        relay.id_tables = [data[:-1] + bytes([data[-1] ^ 1]), data]
    else:
        relay.garbage = ["FetchIdTable"]
        relay.id_tables = [data, data]
    with connect(relay.address) as teacher:
        assert [one.digest for one in teacher.id_tables] == [table.digest]
