"""Distributions of a trained teacher over vocabularies of the usual sizes, for the benchmarks.

Letters: C rows of a chunk, V vocabulary, M parts of a token.

The demo's teacher has 1,024 ids. To get V of them each id is split into M = V / 1024 parts: part j
has a share like 1 / (j + 1) of its id, times log-normal noise of its own in each row, for which part
comes next depends on the text. Ids are shuffled, then the temperature is set so that the mean
entropy is the stated one. The noise is chosen so that the ids' average frequencies have an entropy of
about 11 bits (benchmarks/codec.py prints it), as those of text under tokenizers of these sizes do.

Parts are alike in every row, which makes rows more alike in entropy than the small teacher's: few are
nearly certain and few nearly flat. `spread` undoes that: each row gets a temperature of its own,
log-normal with this standard deviation. With V = 1,024, no noise and no entropy the rows are the
teacher's own.

The student is the teacher, flattened and with noise: early in training with a KL of about 0.5 nats to
it, late with 0.12. What is biased shows late: it does not become smaller as the gradient does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from examples import demo_teacher
from student_trainer import data

TEACHER = Path("runs/codec-teacher")
EARLY, LATE = (0.7, 0.7), (0.85, 0.4)
"""Students: how sharp, and with how much noise, a student's logits are beside the teacher's."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Some rows of the teacher and what a student makes of them."""

    logits: Tensor
    """(C, V) float32 of the teacher, at the calibrated temperature."""
    student: Tensor
    """(C, V) float32: the teacher's logits flattened, with noise."""
    realized: Tensor
    """(C,) int64 ids drawn from the teacher."""


class Distributions:
    """Rows of a trained teacher, split to a vocabulary and calibrated to an entropy, if one is given."""

    def __init__(
        self,
        vocab_size: int,
        entropy: float | None,
        noise: float,
        spread: float = 0.0,
        student: tuple[float, float] = EARLY,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.vocab_size = vocab_size
        self.noise = noise
        self.student = student
        self.device = torch.device(device)
        self.source = teacher_logits()
        self.parts = vocab_size // self.source.shape[1]
        shuffle = torch.Generator().manual_seed(0)
        self.order = torch.randperm(vocab_size, generator=shuffle).to(self.device)
        of_rows = torch.randn(len(self.source), generator=shuffle).mul_(spread).exp_()
        self.temperatures = of_rows.to(self.device)
        self.temperature = 1.0
        if entropy is None:
            return
        # Of the rows that the benchmarks measure, every eighth.
        sample = torch.cat([self.chunk(first, 4).logits for first in range(0, 1024, 32)])
        low, high = 0.1, 2.0
        for _ in range(12):
            self.temperature = math.sqrt(low * high)
            if float(entropies(sample / self.temperature).mean()) < entropy:
                low = self.temperature
            else:
                high = self.temperature

    def chunk(self, first: int, num_rows: int) -> Chunk:
        """The rows from number `first` on."""
        generator = torch.Generator(self.device).manual_seed(1 + first)
        coarse = self.source[first : first + num_rows].to(self.device)
        share = -torch.arange(1, self.parts + 1, device=self.device).log()
        split = torch.randn(*coarse.shape, self.parts, generator=generator, device=self.device)
        split = split.mul_(self.noise).add_(share).add_(coarse[:, :, None]).flatten(1)
        logits = torch.empty_like(split)
        temperatures = self.temperatures[first : first + num_rows, None]
        logits[:, self.order] = split.div_(temperatures * self.temperature)
        student = torch.randn(logits.shape, generator=generator, device=self.device)
        sharpness, noise = self.student
        student.mul_(noise).add_(logits, alpha=sharpness)
        realized = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        return Chunk(logits, student, realized)

    def chunks(self, first: int, num_rows: int) -> Iterator[Chunk]:
        """The rows from `first` to first + num_rows, in chunks of about 32 MiB."""
        size = max(1, min(num_rows, (32 << 20) // (4 * self.vocab_size)))
        for start in range(first, first + num_rows, size):
            yield self.chunk(start, min(size, first + num_rows - start))


def entropies(logits: Tensor) -> Tensor:
    """(C, V) -> (C,) nats."""
    return torch.special.entr(logits.softmax(1)).sum(1)


def teacher_logits(num_rows: int = 8192) -> Tensor:
    """(num_rows, 1024) logits of the demo's teacher on held-out text; trained if need be (1 min)."""
    demo_teacher.build_teacher(TEACHER)
    model = Gemma2ForCausalLM.from_pretrained(TEACHER).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TEACHER)
    _, held_out = demo_teacher.corpus_files()
    sequences = data.pack(held_out, tokenizer, demo_teacher.SEQUENCE, label="held-out data")
    needed = -(-num_rows // (demo_teacher.SEQUENCE - 1))
    with torch.inference_mode():
        logits = model(sequences[:needed]).logits[:, :-1].flatten(0, 1)
    return logits[:num_rows].float().clone()
