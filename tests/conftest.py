"""Fixtures: tiny teachers on disk, and real services in processes of their own.

Services are started from a forkserver that has torch and transformers loaded and gRPC untouched:
the imports would cost seconds for each.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.support import tiny

torch.set_num_threads(2)
# Services, trainers and the tests themselves want the same few cores: docs/deploying.md.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The client sets it too; which test file is imported first, and with it gRPC, is chance.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
if "HF_DATASETS_CACHE" not in os.environ:  # of this run of the tests, not the user's
    DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="datasets-")
    os.environ["HF_DATASETS_CACHE"] = DATASETS_CACHE.name
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script's `make test &` has it ignored, and so would have every program that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.support.preload"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that several processes end at the same time."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> "ByFile":
    """Where several processes run tests (`-n`)."""
    return ByFile(config, log)


class ByFile(LoadFileScheduling):
    """A file of tests stays in one process, and so do all files that share a Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith("tests/ray/") else super()._split_scope(nodeid)


def one_torch_thread() -> Iterator[None]:
    """Body of a fixture: one thread of torch, for tests whose tensors are small. Threads that wait
    for each other on busy cores more than doubled their time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ENDLESS_CLIENT = """
import sys, torch
from student_trainer import connect
with connect(sys.argv[1]) as teacher:
    endless = iter(lambda: torch.arange(200), None)
    for number, _ in enumerate(teacher.stream(endless, ahead=256)):
        if number == 3:
            print("streaming", flush=True)
"""
"""A program that streams from the address given to it until it is stopped."""


@dataclass
class Served:
    """A running `teacher-server serve`."""

    process: BaseProcess
    log: Path
    address: str = ""

    def output(self) -> str:
        return self.log.read_text()

    def wait_ready(self, seconds: float = 300.0) -> str:
        """The address, once the service has printed it; fails with its output if it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in self.output().splitlines():
                if line.startswith("ready "):
                    self.address = line.split()[1]
                    return self.address
            if not self.process.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"the service did not become ready:\n{self.output()}")

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int | None:
        """Sends a signal and returns the exit code; kills what does not stop."""
        if self.process.is_alive():
            self.send_signal(number)
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the service did not stop in {seconds} s:\n{self.output()}")
        return self.process.exitcode


Serve = Callable[..., Served]


def _run_server(arguments: list[str], log: str, hook: Callable[[], None] | None) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from teacher_server.cli import main

    if hook is not None:
        hook()
    sys.exit(main(["serve", *arguments]))


@contextmanager
def services(folder: Path) -> Iterator[Serve]:
    """start(model, "--flag", ...) -> Served; what still runs in the end is stopped.

    hook: a picklable function that runs in the service's process before it starts. Logs go to
    `folder`.
    """
    started: list[Served] = []

    def start(
        model: Path | str,
        *flags: str,
        hook: Callable[[], None] | None = None,
        ready: bool = True,
    ) -> Served:
        log = folder / f"log-{len(started)}"
        log.touch()
        arguments = ["--model", str(model), "--standalone", *flags]
        if "--port" not in flags:
            arguments += ["--port", "0"]
        process = FORKSERVER.Process(
            target=_run_server, args=(arguments, str(log), hook), daemon=True
        )
        process.start()
        served = Served(process, log)
        started.append(served)
        if ready:
            served.wait_ready()
        return served

    yield start
    for served in started:
        if served.process.is_alive():
            served.stop()


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """serve(folder, "--flag", ...) -> Served; see `services`."""
    with services(tmp_path_factory.mktemp("serve")) as start:
        yield start


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """model_folder("Gemma2", 1001) -> the folder of that tiny teacher, made once."""
    made: dict[tuple[str, int], Path] = {}

    def folder(name: str, vocab_size: int) -> Path:
        key = (name, vocab_size)
        if key not in made:
            path = tmp_path_factory.mktemp(f"{name.lower()}-{vocab_size}")
            made[key] = tiny.save_model(path, name, vocab_size)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def gemma_service(serve: Serve, model_folder: Callable[[str, int], Path]) -> Served:
    """A tiny Gemma 2 teacher with an odd vocabulary of 1,001, shared by many tests."""
    return serve(model_folder("Gemma2", 1001))
