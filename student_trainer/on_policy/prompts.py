"""Makes the prompts that a student continues: of the rows of a batch, or of text, chats and ids.

Letters: B rows, T tokens of the longest.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from student_trainer.errors import InvalidRequest
from student_trainer.teachers.layout import ROW_COLUMNS, Layout

TOKEN_KEYS = frozenset(
    (
        *("input_ids", "attention_mask", "labels", "shift_labels", "position_ids", "seq_idx"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "token_type_ids"),
    )
)
"""What a batch says about its tokens, and no longer holds for other tokens."""


def take_prompts(batch: Mapping[str, Any], prompt_tokens: int, longest: int) -> list[Tensor]:
    """Returns a prompt of each row of a batch, on the CPU.

    Where a row begins with tokens that are not trained, such as a question, they are the prompt, and of
    more than `longest` the last ones. Of any other row it is the first `prompt_tokens` tokens of its
    first document. Raises InvalidRequest for what is no batch.
    """
    layout = Layout.of(batch)
    prompts = []
    for ids, real, document, trained in zip(
        layout.ids, layout.real, layout.document, layout.trained, strict=True
    ):
        first = int(real.long().argmax())
        ids = ids[first:][real[first:] & (document[first:] == document[first])]
        rows = trained[first : first + len(ids)].nonzero()[:, 0]
        start = int(rows[0]) + 1 if len(rows) else len(ids)
        # A row of which everything is trained begins with its first token, which nothing predicts.
        prompt = ids[:start][-longest:] if start > 1 else ids[: min(prompt_tokens, longest)]
        prompts.append(prompt.clone())
    return prompts


def take_columns(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a batch has beside its tokens, which stays true of other texts of its rows."""
    num_rows = len(torch.atleast_2d(torch.as_tensor(batch["input_ids"])))
    return {
        name: values
        for name, values in batch.items()
        if name == ROW_COLUMNS
        or (name not in TOKEN_KEYS and hasattr(values, "__len__") and len(values) == num_rows)
    }


def read_prompt(prompt: Any, tokenizer: Any, longest: int, where: str) -> Tensor:
    """Returns (P,) int64 of a text, the messages of a chat or token ids; of too many, the last ones.

    Raises InvalidRequest; its message begins with `where`.
    """
    is_chat = isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping)
    if isinstance(prompt, str) or is_chat:
        if tokenizer is None:
            raise InvalidRequest(
                f"{where} is {'a chat' if is_chat else 'text'}, which needs a tokenizer: give "
                "tokenizer=..., or token ids"
            )
        if is_chat:
            ids = tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer(prompt).input_ids
            if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # the student goes on after it
                ids = ids[:-1]
        prompt = ids
    try:
        found = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(0.0)
    if found.dim() != 1 or found.is_floating_point() or not len(found) or int(found.min()) < 0:
        raise InvalidRequest(
            f"{where} must be text, messages or at least one token id, got {str(prompt)[:80]!r}"
        )
    return found.to("cpu", torch.int64)[-longest:]
