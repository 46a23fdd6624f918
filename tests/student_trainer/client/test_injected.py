"""Whatever a background thread raises reaches the caller, with its cause, and nobody waits for ever."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from student_trainer import LocalTeacher, Recorded, TeacherError, connect, prefetch
from student_trainer.client import answers
from student_trainer.client.io_thread import IoThread
from student_trainer.record import sealer
from student_trainer.record.catalog import Catalog
from student_trainer.record.replay import Replayer
from tests.conftest import Served, one_torch_thread
from tests.support import tiny
from tests.support.oracle import within

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

VOCAB = 101
SEQUENCES = [torch.arange(start, start + 9) for start in range(4)]
KINDS = (RuntimeError, MemoryError, ValueError, StopIteration, SystemExit)


@pytest.fixture(scope="module")
def live() -> LocalTeacher:
    return LocalTeacher(tiny.make_model("Llama", VOCAB))


def fails(kind: type[BaseException]):
    def fail(*_: object, **__: object):
        raise kind("a bug")

    return fail


def expect(kind: type[BaseException], work) -> None:
    """The work raises that, or an error that comes from it."""
    with pytest.raises((kind, TeacherError, RuntimeError)) as caught:
        within(20, work)
    causes: list[BaseException] = [caught.value]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    assert isinstance(causes[-1], kind)
    assert "a bug" in str(causes[-1])


class Broken:
    """A source that fails at its start, at its first item, or when it is asked where it is."""

    def __init__(self, where: str, kind: type[BaseException]) -> None:
        self.where, self.kind = where, kind

    def __iter__(self) -> Iterator[int]:
        if self.where == "start":
            raise self.kind("a bug")
        return self.items()

    def items(self) -> Iterator[int]:
        yield 1
        if self.where == "item":
            raise self.kind("a bug")
        yield 2


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, ValueError, SystemExit])
@pytest.mark.parametrize("where", ["start", "item"])
def test_a_prefetch_hands_on_what_its_source_raises(where: str, kind: type[BaseException]):
    expect(kind, lambda: list(prefetch(Broken(where, kind), ahead=2)))


def test_a_prefetch_hands_on_what_moving_an_item_raises():
    class NoTensor(torch.Tensor):
        def to(self, *_: object, **__: object):
            raise MemoryError("a bug")

    item = torch.zeros(2).as_subclass(NoTensor)
    expect(MemoryError, lambda: list(prefetch([item], device="meta")))


@pytest.mark.parametrize("kind", [MemoryError, StopIteration])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Catalog, "_find"),
        (Replayer, "_fetch"),
        (Replayer, "_resolve"),
        (Recorded, "_keep"),
        (Catalog, "drop"),
        (Recorded, "_answer"),
    ],
)
def test_what_the_thread_of_a_record_raises_reaches_who_waits(
    live,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    kind: type[BaseException],
):
    """Also of a request that waits for one that was asked for before, and of a damaged shard."""
    with Recorded(tmp_path, live) as record:
        list(record.stream(SEQUENCES, targets="top_k:4"))
    (shard,) = tmp_path.glob("shard-*")
    if name == "drop":
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 255
        shard.write_bytes(content)
    sequences = [torch.arange(20, 29)] if name == "_keep" else SEQUENCES
    with Recorded(tmp_path, live, verify=False) as record:
        twice = [*sequences, *sequences]
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fails(kind))
            expect(kind, lambda: list(record.stream(twice, targets="top_k:4")))
        again = within(20, lambda: list(record.stream(twice, targets="top_k:4")))
        assert len(again) == len(twice)


def test_a_record_that_cannot_begin_to_be_written_tells_all_who_wait(
    live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with Recorded(tmp_path, live) as record:
        monkeypatch.setattr(sealer, "Writer", fails(MemoryError))
        twice = [SEQUENCES[0], SEQUENCES[0]]
        expect(MemoryError, lambda: list(record.stream(twice, targets="top_k:4")))


@pytest.fixture(scope="module")
def served(serve, model_folder) -> Served:
    return serve(model_folder("Llama", VOCAB))


@pytest.mark.parametrize("kind", KINDS)
def test_what_decoding_raises_reaches_the_caller_and_the_client_lives_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
):
    with connect(served.address) as teacher:
        with monkeypatch.context() as patched:
            patched.setattr(answers, "assemble", fails(kind))
            expect(kind, lambda: list(teacher.stream(SEQUENCES, targets="top_k:4")))
        assert within(20, lambda: len(list(teacher.stream(SEQUENCES, targets="top_k:4")))) == 4


def test_the_thread_of_the_clients_outlives_an_exit(served: Served):
    async def leave() -> None:
        raise SystemExit("a bug")

    expect(SystemExit, lambda: IoThread.shared().run(leave()))
    with connect(served.address) as teacher:
        assert within(20, lambda: len(list(teacher.stream(SEQUENCES, targets="top_k:4")))) == 4
