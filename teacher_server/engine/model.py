"""Turns tokens into final hidden states, and identifies the teacher that did.

Letters: B sequences, L tokens of a padded sequence, D hidden size, V vocabulary.

Any causal LM of transformers works. Each sequence is padded on the right to its own canonical
length, never to its neighbours', and no attention mask is passed: causal attention keeps the
padding out of every real row, and the shape of the computation, and so its rounding, depends on the
sequence alone.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from logit_codec import FORMAT_VERSION, IdTable
from logit_codec.selection import ARITHMETIC as SELECTION_ARITHMETIC
from teacher_server.engine.batch import bucket_length

HEAD_ARITHMETIC = "model-forward-1"
"""Names how logits are made from hidden states; part of the fingerprint."""


@dataclass(frozen=True, slots=True, eq=False)
class TeacherModel:
    """Holds a causal LM that is ready to score, and what identifies it."""

    causal_lm: Any
    tokenizer: Any | None
    name: str
    revision: str
    weights_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    """V, the rows of the head."""
    effective_vocab_size: int
    """Ids from here on are padding rows of the head, with probability 0."""
    max_sequence_tokens: int
    head: nn.Module = field(repr=False)
    """The causal LM with its base model taken out: hidden states in, logits out."""
    id_table: IdTable | None = None
    """Fitted to this teacher by `teacher-server fit-ids`; shortens the ids of targets."""

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.causal_lm.dtype

    @property
    def architecture(self) -> str:
        return type(self.causal_lm).__name__

    @property
    def attention(self) -> str:
        return self.causal_lm.config._attn_implementation

    @property
    def has_experts(self) -> bool:
        config = self.causal_lm.config.get_text_config()
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return any((getattr(config, name, None) or 0) > 1 for name in names)

    @property
    def _config(self) -> dict[str, Any]:
        """What decides the arithmetic: softcaps, windows, scales, but no names or versions."""
        volatile = {"_name_or_path", "transformers_version", "architectures", "use_cache"}
        content = self.causal_lm.config.to_dict()
        return {name: value for name, value in content.items() if name not in volatile}

    @property
    def teacher_fingerprint(self) -> str:
        """The SHA-256 (hex) of everything that decides the bytes of an answer."""
        parts = {
            "weights": self.weights_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "effective_vocab_size": self.effective_vocab_size,
            "architecture": self.architecture,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "attention": self.attention,
            "head": HEAD_ARITHMETIC,
            "selection": SELECTION_ARITHMETIC,
            "config": self._config,
            "buckets": [bucket_length(n, 2**20) for n in (2, 300, 5000)],
            "max_sequence_tokens": self.max_sequence_tokens,  # caps the buckets
            "format": FORMAT_VERSION,
            "id_table": "" if self.id_table is None else self.id_table.digest.hex(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def bucket_length(self, num_tokens: int) -> int:
        return bucket_length(num_tokens, self.max_sequence_tokens)

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[Tensor]) -> Tensor:
        """Runs sequences of one canonical length, (l,) int64 each -> (B, L, D) hidden states.

        Rows from a sequence's own length on are padding and mean nothing.
        """
        length = self.bucket_length(len(sequences[0]))
        ids_BL = torch.zeros(len(sequences), length, dtype=torch.int64)
        for row, sequence in zip(ids_BL, sequences, strict=True):
            row[: len(sequence)] = sequence
        output = self.causal_lm.base_model(input_ids=ids_BL.to(self.device), use_cache=False)
        return output.last_hidden_state

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Projects (C, D) -> (C, V) logits, in the model's own head arithmetic and dtype."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0]
