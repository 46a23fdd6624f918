"""Compares the distributions of two teachers, or of two precisions of one, row by row.

Letters: L tokens of a sequence, N rows of all sequences, C rows of a chunk, D hidden size,
V vocabulary.

Both give a distribution of every id at every row, which are compared in float32. They need not fit
into memory together: of the first, only its (N, D) hidden states and its vocabulary head are kept
while the second runs. No (N, V) matrix exists: logits are made again from the states, a chunk of rows
at a time.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from logit_codec import TopKSpec
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.quantization import weights_nbytes
from teacher_server.errors import ModelError

CHUNK_NBYTES = 32 << 20
"""Size of a chunk of float32 logits; a comparison needs about eight of them."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Says which teacher it was, and what its weights take."""

    model: str
    dtype: str
    quantization: str
    device: str
    weights_nbytes: int
    """In memory, with the scales of what is quantised."""
    teacher_fingerprint: str

    @classmethod
    def of(cls, model: TeacherModel) -> Self:
        """Reads it from a loaded teacher."""
        return cls(
            model=model.name,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=model.quantization,
            device=str(model.device),
            weights_nbytes=weights_nbytes(model.causal_lm),
            teacher_fingerprint=model.teacher_fingerprint,
        )


@dataclass(frozen=True, slots=True, eq=False)
class HeldStates:
    """Holds what is needed of a teacher to make the logits of any row, and not the teacher."""

    identity: Identity
    effective_vocab_size: int
    head: nn.Module
    hidden_ND: Tensor
    """On the host, in the model's dtype."""
    device: torch.device

    @classmethod
    @torch.inference_mode()
    def of(cls, model: TeacherModel, sequences: Sequence[Tensor]) -> Self:
        """Runs a teacher over some sequences, as it is run when it is served."""
        engine = Engine(model)
        hidden = dict(_hidden_states(engine, sequences))
        return cls(
            identity=Identity.of(engine.model),
            effective_vocab_size=model.effective_vocab_size,
            head=model.head,
            hidden_ND=torch.cat([hidden[index] for index in range(len(sequences))]),
            device=model.device,
        )

    @torch.inference_mode()
    def logits(self, rows: slice, size: int) -> Tensor:
        """Makes (C, V) float32 logits of the first `size` ids."""
        hidden_CD = self.hidden_ND[rows].to(self.device)
        logits = self.head(inputs_embeds=hidden_CD[None], use_cache=False).logits[0]
        return logits[:, :size].float()


@dataclass(frozen=True, slots=True, eq=False)
class RowMeasures:
    """Holds how far two distributions are apart at each of R rows, in nats."""

    kl: Tensor
    """KL(first || second)."""
    reverse_kl: Tensor
    """KL(second || first)."""
    is_same_top: Tensor
    """Whether both find the same id likeliest."""
    logprob_error: Tensor
    """By how much their logprobs of the token that came next differ."""
    log_z_error: Tensor
    """By how much the logs of the sums of their exponentiated logits differ."""

    @classmethod
    def of_logits(cls, first_CV: Tensor, second_CV: Tensor, next_ids: Tensor) -> Self:
        """Measures float32 logits of the same ids; 0 exactly where they are equal."""
        log_z, logp = normalise(first_CV)
        other_log_z, logq = normalise(second_CV)
        return cls(
            kl=(logp.exp() * (logp - logq)).sum(1),
            reverse_kl=(logq.exp() * (logq - logp)).sum(1),
            is_same_top=first_CV.argmax(1) == second_CV.argmax(1),
            logprob_error=(_at(logp, next_ids) - _at(logq, next_ids)).abs(),
            log_z_error=(log_z - other_log_z).abs(),
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Joins the measures of several chunks, on the host."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name).cpu() for part in parts]) for name in names))

    def summary(self) -> dict[str, Any]:
        """Returns means, and of the divergences also quantiles, over all rows."""
        return {
            "kl": summarise(self.kl),
            "reverse_kl": summarise(self.reverse_kl),
            "top1_agreement": float(self.is_same_top.double().mean()),
            "logprob_error": float(self.logprob_error.double().mean()),
            "log_z_error": float(self.log_z_error.double().mean()),
        }


def normalise(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (C,) log Z and the (C, V) logprobs of float32 logits."""
    log_z = logits_CV.logsumexp(1)
    return log_z, logits_CV - log_z[:, None]


def summarise(values: Tensor) -> dict[str, float]:
    """Returns mean, median, 99th percentile and maximum of (R,) numbers."""
    numbers = values.double().numpy()
    p50, p99 = np.quantile(numbers, (0.5, 0.99))
    return {
        "mean": float(numbers.mean()),
        "p50": float(p50),
        "p99": float(p99),
        "max": float(numbers.max()),
    }


def compare_states(
    first: HeldStates, second: HeldStates, next_ids: Tensor, *, chunk_nbytes: int = CHUNK_NBYTES
) -> RowMeasures:
    """Compares two teachers of one vocabulary at every row; next_ids: (N,) tokens that came next."""
    # A teacher without a tokenizer does not know which rows of its head are padding.
    size = min(first.effective_vocab_size, second.effective_vocab_size)
    chunk_rows = max(1, chunk_nbytes // (4 * size))
    parts = []
    for start in range(0, len(next_ids), chunk_rows):
        rows = slice(start, start + chunk_rows)
        first_CV = first.logits(rows, size)
        second_CV = second.logits(rows, size).to(first_CV.device)
        wanted = next_ids[rows].to(first_CV.device)
        parts.append(RowMeasures.of_logits(first_CV, second_CV, wanted))
    return RowMeasures.cat(parts)


def hold(load: Callable[[], TeacherModel], sequences: Sequence[Tensor]) -> HeldStates:
    """Loads a teacher, runs it and lets go of it, but for its head. Raises ModelError."""
    states = HeldStates.of(load(), sequences)
    gc.collect()  # modules refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return states


def cut_text(tokenizer: Any, text: str, *, max_tokens: int, sequence_tokens: int) -> list[Tensor]:
    """Makes sequences of the first tokens of a text, (L,) int64 each. Raises ModelError."""
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    sequences = [one for one in torch.tensor(found).split(sequence_tokens) if len(one) > 1]
    if not sequences:
        raise ModelError(f"the text has {len(found)} tokens; at least 2 are needed")
    return sequences


def next_ids_of(sequences: Sequence[Tensor]) -> Tensor:
    """Returns the (N,) tokens that came next at the rows of some sequences."""
    return torch.cat([sequence[1:] for sequence in sequences])


def _hidden_states(engine: Engine, sequences: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of a sequence and its (L-1, D) states, on the host."""
    model = engine.model
    if not model.is_packed:
        for index, sequence in enumerate(sequences):
            states = model.padded_hidden_states([sequence])[0, : len(sequence) - 1]
            yield index, states.cpu()
        return
    no_rows = torch.empty(0, dtype=torch.int64)
    requests = [RowRequest(sequence, no_rows, TopKSpec(k=1)) for sequence in sequences]
    for pack in engine.packer.pack(requests):
        hidden_TD = model.hidden_states(
            pack.token_ids.to(model.device),
            pack.positions.to(model.device),
            pack.cu_seqlens.to(model.device),
            pack,
        )
        for member, start in zip(pack.members, pack.starts, strict=True):
            yield member, hidden_TD[start : start + len(sequences[member]) - 1].cpu()


def _at(logprobs_CV: Tensor, ids: Tensor) -> Tensor:
    return logprobs_CV.gather(1, ids[:, None])[:, 0]
