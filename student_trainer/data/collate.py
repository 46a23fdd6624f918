"""Makes batches of rows, as models of transformers take them.

B: rows of a batch, T: tokens of the longest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from student_trainer.teachers.layout import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Collator:
    """Stacks rows of equal length, and pads others on the right."""

    pad_id: int = 0
    teacher_column: str = ""
    """Kept as a list of names, one for each row."""

    @classmethod
    def of(cls, tokenizer: Any, teacher_column: str = "") -> "Collator":
        """Pads with the tokenizer's pad token, or its end token if it has none."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(one for one in ids if one is not None), teacher_column)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a batch of (B, T) int64: input_ids, and what the rows have of labels and position_ids.

        Padding has attention_mask 0. Beside position_ids there is no attention_mask, by which models
        would not see the borders of documents: there padding is a document of its own, which labels
        leave out.
        """
        columns = {
            name: [
                # In a mixture, rows of which all tokens are trained need not have labels.
                torch.as_tensor(
                    row["input_ids"] if row.get(name) is None else row[name], dtype=torch.int64
                )
                for row in rows
            ]
            for name in ("input_ids", "labels", "position_ids")
            if any(row.get(name) is not None for row in rows)
        }
        ids = columns["input_ids"]
        lengths = torch.tensor([len(one) for one in ids])
        longest = int(lengths.max())
        if "position_ids" in columns and int(lengths.min()) < longest:
            columns.setdefault("labels", ids)
            columns["position_ids"] = [
                torch.cat([one, torch.arange(longest - len(one))])
                for one in columns["position_ids"]
            ]
        fill = {"input_ids": self.pad_id, "labels": IGNORE_INDEX, "position_ids": 0}
        batch: dict[str, Any] = {
            name: pad_sequence(values, batch_first=True, padding_value=fill[name])
            for name, values in columns.items()
        }
        if "position_ids" not in columns and int(lengths.min()) < longest:
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        if self.teacher_column:
            batch[self.teacher_column] = [row[self.teacher_column] for row in rows]
        return batch
