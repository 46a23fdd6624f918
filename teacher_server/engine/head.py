"""Turns hidden states into targets, through the vocabulary head in chunks of rows.

Letters: N requested rows of a batch, C rows of one chunk, D hidden size, V vocabulary.

The (N, V) matrix of logits never exists: a chunk is projected, selected from and dropped. Chunks
are padded to a multiple of 32 rows because products and sums of fewer rows round differently.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from logit_codec import Targets, TargetSpec, select
from teacher_server.engine.batch import RowRequest, StageTimes
from teacher_server.engine.model import TeacherModel

ROW_MULTIPLE = 32
MAX_CHUNK_ROWS = 1024


class VocabularyHead:
    """Projects hidden states to targets with bounded memory.

    Extra memory is at most 2.5 * chunk_rows * V * 4 bytes: the logits, one buffer beside them, and
    the candidates of the top-k. chunk_nbytes is the size of a chunk in the model's dtype; above
    32 MiB glibc returns a buffer at once, smaller ones pile up between the targets that are kept.
    """

    def __init__(self, model: TeacherModel, *, chunk_nbytes: int = 128 << 20) -> None:
        self.model = model
        row_nbytes = model.vocab_size * model.dtype.itemsize
        rows = chunk_nbytes // row_nbytes // ROW_MULTIPLE * ROW_MULTIPLE
        self.chunk_rows = min(max(rows, ROW_MULTIPLE), MAX_CHUNK_ROWS)

    @torch.inference_mode()
    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Projects (C, D) -> (C, V) float32 logits; -inf for ids that are padding."""
        logits_CV = self.model.logits(hidden_CD).float()
        logits_CV[:, self.model.effective_vocab_size :] = -torch.inf
        return logits_CV

    @torch.inference_mode()
    def project(
        self,
        hidden: Tensor,
        spec: TargetSpec,
        *,
        temperature: float,
        realized_ids: Tensor,
        uniforms: Tensor | None = None,
    ) -> Targets:
        """Selects the targets of N rows from (N, D) hidden states and the (N,) next tokens.

        uniforms: (N,) float64, for a spec that draws.
        """
        parts = []
        for first in range(0, len(hidden), self.chunk_rows):
            chunk = slice(first, first + self.chunk_rows)
            hidden_CD, realized_C = hidden[chunk], realized_ids[chunk]
            uniforms_C = None if uniforms is None else uniforms[chunk]
            num_rows = len(hidden_CD)
            missing = -num_rows % ROW_MULTIPLE
            if missing:
                hidden_CD = torch.nn.functional.pad(hidden_CD, (0, 0, 0, missing))
                realized_C = torch.nn.functional.pad(realized_C, (0, missing))
                if uniforms_C is not None:
                    uniforms_C = torch.nn.functional.pad(uniforms_C, (0, missing))
            logits_CV = self.logits(hidden_CD)
            targets = select(
                logits_CV,
                spec,
                temperature=temperature,
                uniforms=uniforms_C,
                realized_ids=realized_C,
            )
            del logits_CV  # before the next chunk's are made: two would not fit
            parts.append(targets[:num_rows])
        return Targets.cat(parts)

    @torch.inference_mode()
    def score(self, batch: Sequence[RowRequest]) -> tuple[list[Targets], StageTimes]:
        """Returns the targets of sequences of one canonical length, in order, and the times.

        Rows of different sequences share chunks if they ask for the same targets.
        """
        device = self.model.device
        started = time.perf_counter()
        hidden_BLD = self.model.hidden_states([item.token_ids for item in batch])
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # else the time of the forward pass is counted below
        forwarded = time.perf_counter()

        groups: dict[tuple[TargetSpec, float], list[int]] = {}
        for index, item in enumerate(batch):
            groups.setdefault((item.spec, item.temperature), []).append(index)
        results: dict[int, Targets] = {}
        for (spec, temperature), members in groups.items():
            sizes = [len(batch[index].rows) for index in members]
            sequence = torch.repeat_interleave(torch.tensor(members), torch.tensor(sizes))
            rows = torch.cat([batch[index].rows for index in members])
            realized = torch.cat([batch[i].token_ids[batch[i].rows + 1] for i in members])
            drawn = [item for index in members if (item := batch[index].uniforms) is not None]
            targets = self.project(
                hidden_BLD[sequence.to(device), rows.to(device)],
                spec,
                temperature=temperature,
                realized_ids=realized.to(device),
                uniforms=torch.cat(drawn).to(device) if drawn else None,
            )
            first = 0
            for index, size in zip(members, sizes, strict=True):
                results[index] = targets[first : first + size]
                first += size
        times = StageTimes(forwarded - started, time.perf_counter() - forwarded)
        return [results[index] for index in range(len(batch))], times

    def is_exact(self) -> bool:
        """Tries whether a sequence gives the same bits alone and among neighbours."""
        if self.model.has_experts:
            return False  # which tokens share an expert's product depends on the neighbours
        longest = self.model.max_sequence_tokens
        generator = torch.Generator().manual_seed(1)
        for length in {min(40, longest), min(9, longest)}:
            hidden = [
                torch.randint(self.model.effective_vocab_size, (length,), generator=generator)
                for _ in range(4)
            ]
            alone = self.model.hidden_states(hidden[2:3])[0, :length]
            among = self.model.hidden_states(hidden)[2, :length]
            if not torch.equal(alone, among):
                return False
            padded = torch.nn.functional.pad(alone, (0, 0, 0, -length % ROW_MULTIPLE))
            doubled = torch.cat([torch.zeros_like(padded[:7]), padded, padded])
            doubled = torch.nn.functional.pad(doubled, (0, 0, 0, -len(doubled) % ROW_MULTIPLE))
            few = self.model.logits(padded)[:length]
            many = self.model.logits(doubled)[7 : 7 + length]
            if not torch.equal(few, many):
                return False
        return True
