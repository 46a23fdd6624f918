"""The vocabulary head on its way to the client's disk: killed replicas, damage, full disks, Ctrl-C."""

import logging
import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import grpc
import pytest
import torch
import transformers

from logit_codec import TeacherHead
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import TeacherError, connect
from student_trainer.teachers import head_cache
from tests.conftest import FORKSERVER
from tests.support.fleet import Fleet, wait_until
from tests.support.oracle import left_in_this_process, within
from tests.support.proxy import flip_at, flips

VOCAB = 20_000
NBYTES = 64 + VOCAB * 64 * 4
"""The head's file: five chunks."""
SLOW = 3 << 20
"""Bytes per second of a link on which a head takes a while."""


@pytest.fixture(scope="module")
def fleet(serve, model_folder) -> Iterator[Fleet]:
    with Fleet(serve, model_folder("Llama", VOCAB), proxied=True) as fleet:
        fleet.wait_known()
        yield fleet


@pytest.fixture(scope="module")
def weight(model_folder) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("Llama", VOCAB))
    return model.lm_head.weight.detach()


@pytest.fixture(autouse=True)
def cache(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the heads, empty at first."""
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path))
    yield tmp_path / "heads"
    for proxy in fleet.proxies:
        proxy.calm()
    assert left_in_this_process() == []


def slow(fleet: Fleet) -> None:
    for proxy in fleet.proxies:
        proxy.down.bytes_per_s = SLOW
        proxy.down.chop_nbytes = 1 << 14


def size_of(cache: Path, suffix: str) -> int:
    """Of the one file with this suffix; 0 without one."""
    return sum(path.stat().st_size for path in cache.glob(f"*{suffix}"))


def fetch_in_a_process(address: str, folder: str) -> None:
    os.environ["LOGITSTREAM_CACHE"] = folder  # the forkserver has its own environment
    with connect(address) as teacher:
        teacher.head()


def start_fetching(fleet: Fleet, cache: Path) -> BaseProcess:
    arguments = fleet.addresses[0], str(cache.parent)
    process = FORKSERVER.Process(target=fetch_in_a_process, args=arguments)
    process.start()
    return process


def passed(fleet: Fleet) -> int:
    return sum(proxy.down.nbytes for proxy in fleet.proxies)


def test_a_head_is_fetched_once_and_checked_whenever_it_is_read(
    fleet: Fleet, cache: Path, weight, caplog
):
    with connect(fleet.addresses[0]) as teacher:
        head = teacher.head()
        assert torch.equal(head.weight, weight)
        assert teacher.head() is head
        assert NBYTES < teacher.counters.received_nbytes < NBYTES + 1000
    (path,) = cache.glob("*.bin")
    assert path.stem == head.fingerprint
    before = passed(fleet)
    with connect(fleet.addresses[0]) as teacher:
        assert torch.equal(teacher.head().weight, weight)
    assert passed(fleet) - before < 1 << 16
    content = bytearray(path.read_bytes())
    content[NBYTES // 2] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING), connect(fleet.addresses[0]) as teacher:
        assert torch.equal(teacher.head().weight, weight)
        assert teacher.counters.received_nbytes > NBYTES
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("fingerprint", "offset", "code", "said"),
    [
        ("ab" * 16, 0, grpc.StatusCode.NOT_FOUND, "ab" * 16),
        ("", 0, grpc.StatusCode.NOT_FOUND, "Describe names"),
        (None, NBYTES + 1, grpc.StatusCode.INVALID_ARGUMENT, f"has {NBYTES} bytes"),
        (None, 2**64 - 1, grpc.StatusCode.INVALID_ARGUMENT, f"offset {2**64 - 1}"),
        (None, NBYTES, grpc.StatusCode.OK, ""),
    ],
)
def test_what_a_replica_does_not_have_is_refused(fleet: Fleet, fingerprint, offset, code, said):
    fingerprint = fleet.describe(0).head_fingerprint if fingerprint is None else fingerprint
    with grpc.insecure_channel(fleet.own[0]) as channel:
        request = teacher_pb2.FetchHeadRequest(fingerprint=fingerprint, offset=offset)
        call = teacher_pb2_grpc.TeacherStub(channel).FetchHead(request, timeout=10)
        if code is grpc.StatusCode.OK:
            assert list(call) == []
            return
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is code
        assert said in caught.value.details()


def test_another_replica_goes_on_where_a_killed_one_ended(fleet: Fleet, cache: Path, weight):
    slow(fleet)
    with connect(fleet.addresses) as teacher, ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(teacher.head)
        wait_until(lambda: size_of(cache, ".part") > NBYTES // 3, "a third has come")
        fleet.kill(0)
        head: TeacherHead = fetching.result(60)
        assert torch.equal(head.weight, weight)
        assert teacher.counters.received_nbytes < NBYTES + 1000
    assert not list(cache.glob("*.part"))
    for proxy in fleet.proxies:
        proxy.calm()
    fleet.start(0)
    fleet.wait_known()


@pytest.mark.parametrize("what", ["in a piece", "in many places"])
def test_damaged_bytes_are_fetched_again(fleet: Fleet, weight, what: str):
    with connect(fleet.addresses[0], patience_s=30.0) as teacher:
        down = fleet.proxies[0].down
        if what == "in a piece":
            down.damage = flip_at(down.nbytes + NBYTES // 2)
        else:
            down.damage = flips(seed=3, every_nbytes=1 << 20, first=down.nbytes)
        assert torch.equal(within(60, teacher.head).weight, weight)
        if what == "in a piece":
            assert teacher.counters.corrupt == 1
            assert teacher.counters.received_nbytes < NBYTES + 1000


def test_a_part_that_is_longer_than_the_head_is_begun_again(fleet: Fleet, cache: Path, weight):
    cache.mkdir()
    fingerprint = fleet.describe(0).head_fingerprint
    (cache / f"{fingerprint}.part").write_bytes(bytes(NBYTES + 5))
    with connect(fleet.addresses[0]) as teacher:
        assert torch.equal(teacher.head().weight, weight)


def test_two_processes_of_a_host_fetch_it_once(fleet: Fleet, cache: Path):
    slow(fleet)
    before = passed(fleet)
    processes = [start_fetching(fleet, cache) for _ in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert NBYTES < passed(fleet) - before < 1.2 * NBYTES
    assert size_of(cache, ".bin") == NBYTES


def test_after_ctrl_c_the_next_attempt_fetches_the_rest(fleet: Fleet, cache: Path, weight):
    slow(fleet)
    process = start_fetching(fleet, cache)
    wait_until(lambda: size_of(cache, ".part") > NBYTES // 3, "a third has come", 60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 1  # KeyboardInterrupt
    kept = size_of(cache, ".part")
    assert NBYTES // 3 < kept < NBYTES
    with connect(fleet.addresses[0]) as teacher:
        assert torch.equal(teacher.head().weight, weight)
        assert teacher.counters.received_nbytes < NBYTES - kept + 1000


@pytest.mark.parametrize("what", ["full", "not a folder"])
def test_a_disk_that_does_not_take_it_is_an_error_that_says_what_to_do(
    fleet: Fleet, cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with connect(fleet.addresses[0]) as teacher:
        if what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (NBYTES // 2, hard))
        else:
            (cache.parent / "file").touch()
            monkeypatch.setenv("LOGITSTREAM_CACHE", str(cache.parent / "file"))
        try:
            with pytest.raises(
                TeacherError, match=r"cannot be kept in .*Make room there, or set LOGITS"
            ):
                teacher.head()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(cache.glob("*.bin"))


def test_a_head_that_is_there_is_used_from_a_folder_that_cannot_be_written(
    fleet: Fleet, weight, monkeypatch: pytest.MonkeyPatch
):
    with connect(fleet.addresses[0]) as teacher:
        teacher.head()

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(head_cache, "_locked", refuse)  # the tests may run as root
    with connect(fleet.addresses[0]) as teacher:
        assert torch.equal(teacher.head().weight, weight)


def test_a_service_that_is_gone_is_an_error_after_the_patience(fleet: Fleet, cache: Path):
    with connect(fleet.addresses[0], patience_s=1.0) as teacher:
        for proxy in fleet.proxies:
            proxy.refuse()
        try:
            with pytest.raises(TeacherError, match="no teacher answers at"):
                within(30, teacher.head)
        finally:
            for proxy in fleet.proxies:
                proxy.accept()
