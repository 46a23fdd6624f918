"""The flat reference loop: batches and their targets in, a trained student and its curve out.

Letters: B sequences, L tokens of each, V vocabulary.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from logit_codec import Targets
from student_trainer.errors import Interrupted
from student_trainer.losses.checks import shared_vocabulary
from student_trainer.losses.distillation import distillation_loss, within
from student_trainer.training.alignment import check_alignment, warn_of_tail
from student_trainer.training.checkpoint import KeepsCheckpoints, restore_random_states
from student_trainer.training.meter import Meter, cross_entropy_sum, means
from student_trainer.training.optimizers import make_optimizers
from student_trainer.training.ranks import Ranks
from student_trainer.training.tensorboard import Curves
from student_trainer.transfer import copy_to, move_to_device

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """What one student's training left behind."""

    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, held-out loss in nats)."""
    steps: int = 0
    """That were taken."""
    train_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """In the steps, without the held-out measurements."""
    waiting_s: float = 0.0
    """Of those, waiting for the next batch with its targets."""
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """Every logged step: step, tokens and seconds so far, and what the progress bar shows."""
    measurements: list[dict[str, float]] = field(default_factory=list)
    """Every point of the curve: step, tokens and seconds so far, held_out_loss, and what else was
    measured."""

    @property
    def held_out_loss(self) -> float:
        return self.curve[-1][1]

    def at(self, step: int) -> dict[str, float]:
        """Where the run is."""
        return {"step": step, "tokens": self.tokens, "seconds": self.seconds}

    def since(self, earlier: "Run", num_losses: int) -> dict[str, float]:
        """Rates since the run was at `earlier`, and the mean of the last losses."""
        recent = self.train_losses[-num_losses:]
        seconds = self.seconds - earlier.seconds
        return {
            "loss": sum(recent) / len(recent),
            "tokens_per_s": (self.tokens - earlier.tokens) / seconds,
            "waiting_fraction": (self.waiting_s - earlier.waiting_s) / seconds,
        }


def train(
    student: nn.Module,
    pairs: Iterable[tuple[dict[str, Tensor], Targets | None]],
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int,
    optimizer: str,
    kd_weight: float,
    ce_weight: float,
    measure: Callable[[nn.Module], float],
    label: str,
    checkpoints: KeepsCheckpoints | None = None,
    log_every: int = 10,
    curves: Curves | None = None,
    also: Callable[[], dict[str, float]] = dict,
    log: Callable[[str], None] | None = None,
    measured: Callable[[], dict[str, float]] = dict,
    num_ids: int | None = None,
    is_aligned: bool = True,
) -> Run:
    """Trains `student` on (batch, targets) pairs; targets None trains on the labels alone.

    batch["input_ids"]: (B, L) without padding; targets: B * (L-1) rows in reading order. `measure`
    gives the held-out loss, called about ten times; `measured` what else it found. With
    `checkpoints`, goes on from the newest and writes new ones; `pairs` then has a state, as streams
    and `prefetch` do. The progress bar shows the last `log_every` steps; so do `curves`, together
    with what `also` returns; with `log`, a line of text goes there instead of the bar. num_ids:
    what the student's head has behind so many ids is padding, without a probability (default:
    nothing is). is_aligned: whether targets must belong to their tokens.

    A student in DistributedDataParallel is trained by all its ranks: a batch is then the share of
    one of them, as `data.share` makes it, and losses and curves are of the whole step.

    Raises ValueError for checkpoints that cannot be used, ProtocolError for targets of other tokens,
    Interrupted instead of KeyboardInterrupt, and what `pairs` raises.
    """
    run, ranks = Run(), Ranks.of(student)
    start, saved = 0, None
    optimizers = make_optimizers(student, optimizer, learning_rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: min((step + 1) / max(1, warmup_steps), (steps - step) / steps)
        )
        for one in optimizers
    ]
    every = max(1, steps // 10)
    device = next(student.parameters()).device
    if checkpoints is not None:
        if not hasattr(pairs, "load_state_dict"):
            raise ValueError("checkpoints need pairs with a state, as prefetch(pairs) has one")
        saved = checkpoints.load(student)
        if saved is not None:
            start, run = saved["step"], Run(**saved["run"])
            for one, state in zip(optimizers, saved["optimizers"], strict=True):
                one.load_state_dict(state)
            for schedule, state in zip(schedules, saved["schedules"], strict=True):
                schedule.load_state_dict(state)
            pairs.load_state_dict(saved["position"])  # type: ignore[attr-defined]
            logger.info("%s: going on from %s", label, checkpoints.newest())
    source: Iterator[tuple[dict[str, Tensor], Targets | None]] = iter(pairs)
    meter = Meter(device)
    losses: list[Tensor] = []
    """Of the last steps, still on the device."""
    logged = replace(run)
    student.train()
    with ExitStack() as ending:
        progress = ending.enter_context(
            tqdm(total=steps, initial=start, desc=label, unit=" steps", disable=log is not None)
        )
        ending.enter_context(_interruptible(run, label))
        if curves is not None:
            ending.enter_context(curves.behind(start))
        for step in range(start, steps):
            asked = time.perf_counter()
            batch, targets = next(source)
            began = time.perf_counter()
            if saved is not None and step == start:
                restore_random_states(saved["random"])
            ids = copy_to(batch["input_ids"], device)
            logits = student(input_ids=ids).logits[:, :-1, :num_ids].flatten(0, 1)
            labels = ids[:, 1:].flatten()
            num_items = int(batch.get("num_items", labels.numel()))
            if targets is not None:
                targets = within(targets, shared_vocabulary(targets, logits.shape[1]))
                logits = logits[:, : targets.vocab_size]
            ce = None
            if targets is None or ce_weight:
                ce = (
                    nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / num_items
                )
            if targets is None:
                loss = ce
            else:
                if step == start:
                    if is_aligned:
                        check_alignment(batch, targets)
                    warn_of_tail(targets, ce_weight)
                targets = move_to_device(targets, device)
                kd = distillation_loss(logits, targets, num_items=num_items)
                loss = kd_weight * kd if ce is None else kd_weight * kd + ce_weight * ce
                if curves is not None:
                    with torch.no_grad():
                        meter.add(
                            targets,
                            kd_sum=kd * num_items,
                            ce_sum=cross_entropy_sum(logits, labels)
                            if ce is None
                            else ce * num_items,
                            best_R=logits.argmax(1),
                        )
            assert loss is not None
            (loss * ranks.count).backward()  # the ranks' gradients are averaged
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            rate = schedules[0].get_last_lr()[0]
            for one, schedule in zip(optimizers, schedules, strict=True):
                one.step()
                one.zero_grad()
                schedule.step()
            losses.append(loss.detach())
            done = run.steps = step + 1
            is_measured = done % every == 0 or done == steps
            is_saved = checkpoints is not None and checkpoints.is_due(done, steps)
            is_logged = done % log_every == 0 or done == steps
            if is_measured or is_saved or is_logged:
                # Waits for the device.
                run.train_losses += ranks.add_up(torch.stack(losses)).tolist()
                losses.clear()
            run.tokens += num_items
            run.waiting_s += began - asked
            run.seconds += time.perf_counter() - asked
            progress.update()
            if is_logged:
                values = {"learning_rate": rate, **run.since(logged, log_every)}
                logged = replace(run)
                values |= also()
                run.history.append({**run.at(done), **values})
                line = (
                    f"loss {values['loss']:.3f}, {values['tokens_per_s']:,.0f} tokens/s, "
                    f"waiting {values['waiting_fraction']:.1%}"
                )
                progress.set_postfix_str(line)
                if log is not None:
                    log(f"{label}: step {done} of {steps}, {line}")
                if curves is not None:
                    curves.add(done, {**values, **means(ranks.add_up(meter.take()))})
            if is_measured:
                run.curve.append((done, measure(student)))
                values = {"held_out_loss": run.held_out_loss, **measured()}
                run.measurements.append({**run.at(done), **values})
                if curves is not None:
                    curves.add(done, values)
                student.train()
            if checkpoints is not None and is_saved:
                state = {
                    "step": done,
                    "optimizers": [one.state_dict() for one in optimizers],
                    "schedules": [schedule.state_dict() for schedule in schedules],
                    "position": pairs.state_dict(),  # type: ignore[attr-defined]
                    "run": asdict(run),
                }
                checkpoints.save(done, student, state)
    return run


@contextmanager
def _interruptible(run: Run, label: str) -> Iterator[None]:
    """Tells whoever catches a Ctrl-C where the run was."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"after step {run.steps} of {label}") from None


@torch.inference_mode()
def held_out_loss(student: nn.Module, sequences: Tensor, *, batch_size: int = 32) -> float:
    """Mean cross-entropy, in nats, of the student on (N, L) sequences."""
    student.eval()
    device = next(student.parameters()).device
    total = 0.0
    for ids in sequences.split(batch_size):
        ids = ids.to(device)
        logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        total += float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
    return total / (sequences.shape[0] * (sequences.shape[1] - 1))
