"""Turns tokens into final hidden states, and identifies the teacher that did.

Letters: T tokens of a pack, B sequences, L tokens of a padded sequence, D hidden size, V vocabulary.

Any causal LM of transformers works. Most run packs (packing.py). An architecture whose attention
does not keep the sequences of a pack apart runs padded sequences instead, each to its own canonical
length and never to its neighbours', without an attention mask: causal attention keeps the padding
out of every real row. Either way the shape of the computation, and so its rounding, depends on the
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

from logit_codec import FORMAT_VERSION, IdTable, TargetSpec, TeacherHead
from logit_codec.selection import ARITHMETIC as SELECTION_ARITHMETIC
from logit_codec.vocabulary_part import VocabularyPart
from teacher_server.engine.attention import NAME as PACKED_ATTENTION
from teacher_server.engine.attention import packed_attention
from teacher_server.engine.fingerprints import without_names
from teacher_server.engine.layers import find_layers
from teacher_server.engine.packing import Pack
from teacher_server.engine.products import InPlaceHead, TiledProducts

MIN_BUCKET = 32
"""Shortest canonical length: products of fewer rows round differently."""


def bucket_length(num_tokens: int, max_tokens: int) -> int:
    """Returns the canonical padded length of a sequence: at most 1/8 longer from 256 tokens on.

    Multiples of 32 up to 256, then eighths of a power of two; never above `max_tokens`.
    """
    step = max(MIN_BUCKET, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return min(-(-num_tokens // step) * step, max_tokens)


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
    is_packed: bool = True
    """Whether it runs packs; else it runs padded sequences."""
    shape: dict[str, Any] = field(default_factory=dict)
    """What an engine adds to the fingerprint: the sizes that its bytes depend on."""
    id_table: IdTable | None = None
    """Fitted to this teacher by `teacher-server fit-ids`; shortens the ids of targets."""
    client_head: TeacherHead | None = None
    """The vocabulary head as clients can use it; None if they cannot."""
    stop_ids: tuple[int, ...] = ()
    """Ids at which the teacher's own texts end, ascending."""
    part: VocabularyPart | None = None
    """Which logits are computed here, if other ranks compute the others; None: all of them."""
    quantization: str = "none"
    """How its linear layers are quantised, with the version of the package; "none": they are not."""

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
        """The name of the attention that answers are computed with."""
        return PACKED_ATTENTION if self.is_packed else self.own_attention

    @property
    def own_attention(self) -> str:
        """The name of the attention that the model was loaded with."""
        return self.causal_lm.config._attn_implementation

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.causal_lm.get_output_embeddings().weight.shape[1]

    @property
    def num_layers(self) -> int:
        """How many layers have states that can be asked for; 0 if none have."""
        layers = find_layers(self.causal_lm)
        return 0 if layers is None else len(layers)

    def complete(self, spec: TargetSpec) -> TargetSpec:
        """Sets what a spec takes from the teacher. Raises ValueError for what it does not have."""
        if spec.needs_hidden and self.client_head is None:
            raise ValueError(
                f"targets of kind hidden are not offered: {self.architecture} does more to its "
                "logits than scale and cap them; use top_k or sampled"
            )
        if spec.feature_layers and spec.feature_layers[-1] > self.num_layers:
            raise ValueError(
                f"this teacher has layers 0 (the embeddings) to {self.num_layers}, got "
                f"{spec.feature_layers[-1]}"
            )
        head = self.client_head
        return spec.for_head("" if head is None else head.fingerprint, self.hidden_size)

    @property
    def has_experts(self) -> bool:
        config = self.causal_lm.config.get_text_config()
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return any((getattr(config, name, None) or 0) > 1 for name in names)

    @property
    def teacher_fingerprint(self) -> str:
        """The SHA-256 (hex) of everything that decides the bytes of an answer."""
        parts = {
            "weights": self.weights_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "effective_vocab_size": self.effective_vocab_size,
            "architecture": self.architecture,
            "dtype": str(self.dtype),
            "attention": self.attention,
            "selection": SELECTION_ARITHMETIC,
            "config": without_names(self.causal_lm.config),
            "format": FORMAT_VERSION,
            "id_table": "" if self.id_table is None else self.id_table.digest.hex(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({} if self.quantization == "none" else {"quantization": self.quantization}),
            **_device_names(self.device),
            **self.shape,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def max_shared_positions(self) -> int | None:
        """Longest sequence that may share a forward pass with any other; None: all may.

        longrope chooses the frequencies of all tokens by the largest position among them.
        """
        config = self.causal_lm.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
        limits = [
            kind["original_max_position_embeddings"]
            for kind in kinds
            if kind.get("rope_type") == "longrope" and "original_max_position_embeddings" in kind
        ]
        return min(limits) if limits else None

    def bucket_length(self, num_tokens: int) -> int:
        return bucket_length(num_tokens, self.max_sequence_tokens)

    @torch.inference_mode()
    def hidden_states(
        self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, pack: Pack
    ) -> Tensor:
        """Runs a pack whose tensors are on the device -> (T, D) hidden states.

        Those of padding mean nothing.
        """
        if pack.tiling is None:
            return self._run_packed(token_ids, positions, cu_seqlens=cu_seqlens)
        tiling = pack.tiling
        with TiledProducts(tiling):
            hidden_TD = self._run_packed(
                tiling.to_tiles(token_ids),
                tiling.to_tiles(positions),
                cu_seqlens=tiling.large_seqlens,
                rest_seqlens=tiling.small_seqlens,
            )
        return tiling.from_tiles(hidden_TD)

    def _run_packed(self, token_ids: Tensor, positions: Tensor, **seqlens: Tensor) -> Tensor:
        with packed_attention(self.causal_lm):
            output = self.causal_lm.base_model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                **seqlens,
            )
        return output.last_hidden_state[0]

    @torch.inference_mode()
    def padded_hidden_states(self, sequences: Sequence[Tensor]) -> Tensor:
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
        """Projects (C, D) -> (C, V) logits, in the model's own head arithmetic and dtype.

        Where ranks share the vocabulary all of them call this at once, and gather the parts: it is
        for few rows.
        """
        return self.join_logits(self.head(inputs_embeds=hidden[None], use_cache=False).logits[0])

    def join_logits(self, logits: Tensor) -> Tensor:
        """Gathers (C, V) logits of what the causal LM computes on this rank."""
        return logits if self.part is None else self.part.whole(logits)

    @torch.inference_mode()
    def logits_into(self, hidden: Tensor, buffer: Tensor, tile: int) -> None:
        """Writes the logits of (C, D) to a (C, V) buffer, -inf for the padding of the head.

        They are as those of `logits`; products are made in tiles of `tile` rows, within the buffer.
        Where ranks share the vocabulary the buffer has the columns of this rank's part.
        """
        with InPlaceHead(buffer, tile):
            self.head(inputs_embeds=hidden[None], use_cache=False)
        first = 0 if self.part is None else self.part.first_id
        buffer[:, max(self.effective_vocab_size - first, 0) :] = -torch.inf


def _device_names(device: torch.device) -> dict[str, str]:
    """Names what a GPU's arithmetic depends on, beside torch's version."""
    if device.type != "cuda":
        return {"device": device.type}
    return {
        "device": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
