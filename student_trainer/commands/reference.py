"""Compares a served teacher with a reference model on this machine: `check --reference`.

Letters: L tokens of a sequence, N rows of all sequences, C rows of a chunk, K kept ids, V vocabulary.

Where the team may ask for whole distributions, the divergences are exact. Else the service tells the
K likeliest ids and the mass of all others as one bucket, and both distributions are compared over
those K + 1 cells: joining cells can only bring distributions nearer to each other, so what is found
is a lower bound.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logit_codec import DenseTargets, SparseTargets, Targets
from student_trainer.client.remote import connect
from student_trainer.losses.divergences import compute_cells
from student_trainer.teachers.teacher import Teacher
from teacher_server.engine.comparison import (
    CHUNK_NBYTES,
    HeldStates,
    RowMeasures,
    cut_text,
    next_ids_of,
    normalise,
)
from teacher_server.engine.loading import load
from teacher_server.engine.model import TeacherModel
from teacher_server.errors import TeacherServerError

MAX_TOKENS, SEQUENCE_TOKENS = 4096, 512
"""At most, of the text."""
WRITTEN, WRITTEN_TOKENS = 8, 128
"""Sequences that the reference writes where no text is given, and the tokens of each."""
MOST_KEPT = 256
"""Ids of a row that are asked for where it cannot be had whole."""
FEWEST_ROWS = 32
"""Whole rows of a sequence that an answer must have room for."""


def compare_reference(
    address: str, reference: str, text: Path | None, *, credentials: dict[str, Any]
) -> dict[str, Any]:
    """Returns how far a served teacher is from a reference: KL(reference || served) and others.

    Raises TeacherError, OSError for the text, and ValueError for a reference that cannot be used.
    """
    try:
        model = load(reference)
        with connect(address, tokenizer=model.tokenizer, patience_s=10.0, **credentials) as teacher:
            return _compare(model, teacher, text)
    except TeacherServerError as error:
        raise ValueError(f"--reference: {error}") from error


def _compare(model: TeacherModel, teacher: Teacher, text: Path | None) -> dict[str, Any]:
    info = teacher.info
    if model.vocab_size < info.effective_vocab_size:
        raise ValueError(
            f"--reference: {model.name} has {model.vocab_size:,} ids, the teacher {info.model} uses "
            f"{info.effective_vocab_size:,}: distributions can be compared only over one vocabulary"
        )
    targets, longest = choose_targets(teacher)
    longest = min(longest, model.max_sequence_tokens, info.max_sequence_tokens)
    if text is None:
        sequences = write_sequences(model, min(longest, WRITTEN_TOKENS))
    elif model.tokenizer is None:
        raise ValueError(f"--reference: {model.name} has no tokenizer to read --text with")
    else:
        content = text.read_text(encoding="utf-8")
        sequences = cut_text(
            model.tokenizer, content, max_tokens=MAX_TOKENS, sequence_tokens=longest
        )
    held = HeldStates.of(model, sequences)
    answers = (answer for _, answer in teacher.stream(sequences, targets=targets))
    measures = measure_answers(held, sequences, answers, info.effective_vocab_size)
    return {
        "model": model.name,
        "dtype": held.identity.dtype,
        "quantization": held.identity.quantization,
        "text": "written by the reference" if text is None else str(text),
        "targets": targets,
        "bound": "exact" if targets == "dense" else "lower bound",
        "rows": len(measures.kl),
        **measures.summary(),
    }


def choose_targets(teacher: Teacher) -> tuple[str, int]:
    """Returns the fullest targets that the team may have, and the longest sequence for them."""
    info = teacher.info
    room = info.limits.max_reply_bytes // (4 * info.vocab_size + 64)
    if "dense" in info.caller.scopes and room >= FEWEST_ROWS:
        return "dense", min(SEQUENCE_TOKENS, room + 1)
    kept = min(MOST_KEPT, info.limits.max_top_k, info.effective_vocab_size)
    return f"top_k:{kept},bits=16", SEQUENCE_TOKENS


@torch.inference_mode()
def write_sequences(model: TeacherModel, length: int) -> list[Tensor]:
    """Draws sequences from a model itself, from a random first token each: (L,) int64."""
    generator = torch.Generator().manual_seed(0)
    size = model.effective_vocab_size
    ids = torch.randint(size, (WRITTEN, 1), generator=generator)
    past = None
    for _ in range(length - 1):
        output = model.causal_lm(
            input_ids=ids[:, -1:].to(model.device), past_key_values=past, use_cache=True
        )
        past = output.past_key_values
        chances = output.logits[:, -1, :size].float().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return list(ids)


def measure_answers(
    held: HeldStates, sequences: Sequence[Tensor], answers: Any, size: int
) -> RowMeasures:
    """Compares the reference with the targets of each sequence; size: ids that are compared."""
    parts, first = [], 0
    chunk_rows = max(1, CHUNK_NBYTES // (4 * size))
    for sequence, answer in zip(sequences, answers, strict=True):
        next_ids = next_ids_of([sequence])
        for start in range(0, len(next_ids), chunk_rows):
            stop = min(start + chunk_rows, len(next_ids))
            logits_CV = held.logits(slice(first + start, first + stop), size).cpu()
            parts.append(measure_rows(logits_CV, answer[start:stop], next_ids[start:stop]))
        first += len(next_ids)
    return RowMeasures.cat(parts)


def measure_rows(logits_CV: Tensor, served: Targets, next_ids: Tensor) -> RowMeasures:
    """Measures what a reference's logits and a teacher's targets say of the same rows."""
    assert served.log_z is not None
    assert served.realized_logprob is not None
    log_z, logp_CV = normalise(logits_CV)
    if isinstance(served, DenseTargets):
        cells_p, cells_q = logp_CV, served.logprobs[:, : logp_CV.shape[1]].float()
    else:
        assert isinstance(served, SparseTargets)
        cells_p, cells_q = _join_cells(logp_CV, served)
    realized = logp_CV.gather(1, next_ids[:, None])[:, 0]
    return RowMeasures(
        kl=compute_cells("forward_kl", 0.0, cells_p, cells_q).sum(1),
        reverse_kl=compute_cells("reverse_kl", 0.0, cells_p, cells_q).sum(1),
        is_same_top=logits_CV.argmax(1) == served.most_likely(),
        logprob_error=(realized - served.realized_logprob.float()).abs(),
        log_z_error=(log_z - served.log_z.float()).abs(),
    )


def _join_cells(logp_CV: Tensor, served: SparseTargets) -> tuple[Tensor, Tensor]:
    """Makes (C, K+1) cells of both: the kept ids, and all others as the last one."""
    rows_E = served.entry_rows()
    entries_E, tail_C = served.entry_logprobs()
    places_E = torch.arange(len(rows_E)) - served.row_splits[rows_E]
    width = int(served.row_splits.diff().max())
    cells_p = logp_CV.new_full((len(logp_CV), width + 1), -torch.inf)
    cells_q = cells_p.clone()
    cells_p[rows_E, places_E] = logp_CV[rows_E, served.token_ids]
    cells_q[rows_E, places_E] = entries_E.float()
    others_CV = logp_CV.clone()
    others_CV[rows_E, served.token_ids] = -torch.inf
    cells_p[:, width] = others_CV.logsumexp(1)
    cells_q[:, width] = tail_C.float()
    return cells_p, cells_q
