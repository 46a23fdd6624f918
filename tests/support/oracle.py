"""What must come out of every run, whatever is broken meanwhile: the run without any fault.

A `Training` is two ranks in processes of their own: each streams its shard, takes real optimizer
steps on a tiny student, and sums its gradients with the other's. What a rank leaves behind is compared
with the fault-free run: the sequences of each step, each target it decoded, the final weights.
"""

import asyncio
import hashlib
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from logit_codec import Targets
from protos import teacher_pb2
from tests.conftest import FORKSERVER
from tests.support import tiny

VOCAB = 1001
RANKS = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """One training run, for every rank."""

    sequences: int = 160
    tokens: int = 48
    batch_size: int = 4
    epochs: int = 2
    targets: str = "top_k:16"
    ahead: int = 12
    """Batches in flight."""
    seed: int = 7
    patience_s: float = 60.0

    @property
    def steps(self) -> int:
        return self.epochs * (self.sequences // (RANKS * self.batch_size))


@dataclass
class Left:
    """What one rank left behind."""

    seen: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    """O1: (epoch, step, sequence ids)."""
    targets: list[str] = field(default_factory=list)
    """O2: digest of the decoded targets of each step."""
    weights: str = ""
    """O3: digest of the final student."""
    behind: list[str] = field(default_factory=list)
    """O5: tasks, processes, threads and files that should not be there."""
    longest_wait_s: float = 0.0
    """O6: for one batch, after the first."""
    counters: dict[str, int] = field(default_factory=dict)
    error: str = ""


class Training:
    """Runs a plan against a service, in the background."""

    def __init__(self, addresses: Sequence[str], plan: Plan, folder: Path) -> None:
        folder.mkdir()
        self._done = FORKSERVER.Array("i", RANKS)
        self._ends = []
        self._processes = []
        for rank in range(RANKS):
            ours, theirs = FORKSERVER.Pipe(duplex=False)
            process = FORKSERVER.Process(
                target=_rank_main,
                args=(theirs, self._done, list(addresses), plan, rank, str(folder)),
            )
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    @property
    def steps(self) -> int:
        """Steps that every rank has finished."""
        return min(self._done)

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def wait_steps(self, count: int, seconds: float = 60.0) -> None:
        """Until every rank has done so many steps."""
        deadline = time.monotonic() + seconds
        while self.running and self.steps < count and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.steps < count:
            self.wait(0.0)  # says why

    def wait(self, seconds: float = 120.0) -> list[Left]:
        """What each rank left; fails if one raised, died or hung."""
        deadline = time.monotonic() + seconds
        left = []
        try:
            for rank, end in enumerate(self._ends):
                assert end.poll(max(0.0, deadline - time.monotonic())), (
                    f"rank {rank} hung at step {self._done[rank]}"
                )
                left.append(end.recv())
                assert not left[-1].error, left[-1].error
        finally:
            for process in self._processes:
                process.join(10.0 if sys.exc_info()[0] is None else 0.5)
                if process.is_alive():
                    process.kill()
                    process.join()
            for end in self._ends:
                end.close()
        return left


def assert_same(left: list[Left], wanted: list[Left]) -> None:
    """O1, O2, O3 and what O5 asks of the trainers."""
    for rank, (mine, theirs) in enumerate(zip(left, wanted, strict=True)):
        assert mine.seen == theirs.seen, f"O1: rank {rank} saw other sequences"
        assert mine.targets == theirs.targets, f"O2: rank {rank} trained on other targets"
        assert mine.weights == theirs.weights, f"O3: rank {rank} has other weights"
        assert not mine.behind, f"O5: rank {rank} left {mine.behind}"


def assert_billed_once(rows: Iterable[teacher_pb2.UsageRow], left: list[Left]) -> None:
    """O4: the ledger counts every row that the ranks received, once; work that was lost is charged."""
    rows = list(rows)
    received = sum(one.counters["rows"] for one in left)
    assert sum(row.delivered_rows for row in rows) == received, "O4: rows"
    assert sum(row.tokens for row in rows) >= received, "O4: tokens"


def digest(targets: Targets) -> str:
    """Of every tensor of decoded targets."""
    state = hashlib.sha256()
    for name, tensor in sorted(targets._tensors().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        state.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, which runs in a thread; fails, with its stack, if it takes longer."""
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        frame = sys._current_frames()[thread.ident or 0]
        raise AssertionError(f"hung for {seconds} s at\n{''.join(traceback.format_stack(frame))}")
    if errors:
        raise errors[0]
    return result[0]


def left_in_this_process() -> list[str]:
    """O5: what the client still holds after every teacher is closed."""
    from student_trainer.client.io_thread import IoThread

    async def tasks() -> list[str]:
        await asyncio.sleep(0.1)  # what was cancelled ends
        mine = asyncio.current_task()
        return [f"task {task}" for task in asyncio.all_tasks() if task is not mine]

    found = IoThread.shared().run(tasks())
    deadline = time.monotonic() + 2.0
    while names := [one.name for one in threading.enumerate() if one.name.startswith("decode")]:
        if time.monotonic() > deadline:
            found += [f"thread {name}" for name in names]
            break
        time.sleep(0.02)
    return found


def _batches(plan: Plan, rank: int) -> Iterator[dict[str, Any]]:
    """Each epoch in an order of its own, this rank's part of every step."""
    generator = torch.Generator().manual_seed(plan.seed)
    sequences = torch.randint(VOCAB, (plan.sequences, plan.tokens), generator=generator)
    size = RANKS * plan.batch_size
    for epoch in range(plan.epochs):
        order = list(range(plan.sequences))
        random.Random(f"{plan.seed} {epoch}").shuffle(order)
        for step in range(plan.sequences // size):
            ids = order[step * size : (step + 1) * size][rank::RANKS]
            yield {"input_ids": sequences[ids], "place": (epoch, step, tuple(ids))}


def _rank_main(
    end: Any, done: Any, addresses: list[str], plan: Plan, rank: int, folder: str
) -> None:
    left = Left()
    # Gloo would look for an interface by the host's name.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    own = Path(folder) / f"tmp-{rank}"
    own.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(own)
    try:
        _train(left, done, addresses, plan, rank, folder)
        left.behind += left_in_this_process()
        left.behind += [f"process {child}" for child in multiprocessing.active_children()]
        left.behind += [f"file {path}" for path in own.rglob("*")]
    except BaseException:
        left.error = f"rank {rank}, after step {done[rank]}:\n{traceback.format_exc()}"
    end.send(left)
    end.close()
    os._exit(0)  # gloo's threads would wait for a rank that failed


def _train(left: Left, done: Any, addresses: list[str], plan: Plan, rank: int, folder: str) -> None:
    import torch.distributed as dist

    from student_trainer import connect, distillation_loss, prefetch

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=RANKS
    )
    student = tiny.make_model("Llama", VOCAB, seed=plan.seed).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    with connect(addresses, patience_s=plan.patience_s) as teacher:
        pairs = teacher.stream_batches(_batches(plan, rank), targets=plan.targets, ahead=plan.ahead)
        source = prefetch(pairs, ahead=2)
        for step in range(plan.steps):
            asked = time.monotonic()
            batch, targets = next(source)
            if step:
                left.longest_wait_s = max(left.longest_wait_s, time.monotonic() - asked)
            left.seen.append(batch["place"])
            left.targets.append(digest(targets))
            ids = batch["input_ids"]
            logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1)
            distillation_loss(logits, targets, labels=ids[:, 1:].flatten()).backward()
            gradient = torch.cat(
                [p.grad.flatten() for p in student.parameters() if p.grad is not None]
            )
            dist.all_reduce(gradient)
            torch.nn.utils.vector_to_parameters(
                gradient, [p.grad for p in student.parameters() if p.grad is not None]
            )
            optimizer.step()
            optimizer.zero_grad()
            done[rank] = step + 1
        assert next(source, None) is None
        left.counters = _counts(teacher.counters)
    state = hashlib.sha256()
    for name, tensor in student.state_dict().items():
        state.update(name.encode() + tensor.contiguous().numpy().tobytes())
    left.weights = state.hexdigest()
    dist.destroy_process_group()


def _counts(counters: Any) -> dict[str, int]:
    return {name: getattr(counters, name) for name in type(counters).__slots__}
