"""Estimates the memory that a rank of a replica needs.

Letters: T tokens of a pack, C rows of a chunk of logits, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

from teacher_server.engine.quantization import Quantization, check_undivided
from teacher_server.errors import ModelError
from teacher_server.planning.gpus import GIB
from teacher_server.planning.sizes import ModelSizes

ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LINEAR_NBYTES = {
    "torchao-fp8": 1.0,
    "torchao-int8": 1.0,
    # 4 bits, and a float32 scale for each 64 weights.
    "bitsandbytes-4bit": 0.5 + 4 / 64,
}
"""Bytes of a weight of an nn.Linear of the body under --quantization, where they are not those of the
dtype: compressed-tensors are unpacked while they are loaded. Scales of whole rows are left out, which are
one number for thousands of weights."""
MIN_MARGIN = 1.5 * GIB
"""For the CUDA context, libraries and compiled graphs; an assumption, not measured."""
MARGIN_SHARE = 0.05
"""Of the device's memory, for what its allocator cannot use; an assumption, not measured."""
MAX_CHUNK_ROWS, MIN_CHUNK_ROWS = 1024, 32
"""As in engine/head.py."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Holds what one rank of a replica keeps in its device's memory, in bytes."""

    ranks: int
    weights: float
    logits: float
    """One chunk of them, and a quarter of it beside."""
    activations: float
    keys: float
    """Of texts that are being written."""
    margin: float
    key_tokens: int
    """Tokens of texts whose keys fit."""
    problem: str = ""
    """Why the model cannot be divided among so many ranks."""

    @property
    def total(self) -> float:
        return self.weights + self.logits + self.activations + self.keys + self.margin


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Holds the sizes that an operator chooses."""

    dtype: str
    quantization: str
    pack_tokens: int
    chunk_nbytes: int
    pool_nbytes: int
    device_nbytes: float


def estimate_memory(sizes: ModelSizes, ranks: int, options: MemoryOptions) -> RankMemory:
    """Estimates the memory of each of some ranks."""
    item = ITEM_NBYTES[options.dtype]
    keys_of_token = item * sum(
        layer.keys.num_heads * (layer.keys.key_size + layer.keys.value_size)
        for layer in sizes.layers
        if layer.window != 0
    )
    return RankMemory(
        ranks=ranks,
        weights=_weights_nbytes(sizes, ranks, options),
        logits=1.25 * _chunk_rows(sizes, options) * sizes.vocab_size * item / ranks,
        activations=options.pack_tokens * item * _numbers_of_token(sizes, ranks),
        keys=options.pool_nbytes,
        margin=MIN_MARGIN + MARGIN_SHARE * options.device_nbytes,
        key_tokens=int(options.pool_nbytes * ranks / keys_of_token) if keys_of_token else 0,
        problem=_find_problem(sizes, ranks, options),
    )


def _weights_nbytes(sizes: ModelSizes, ranks: int, options: MemoryOptions) -> float:
    item = ITEM_NBYTES[options.dtype]
    linear = LINEAR_NBYTES.get(options.quantization, item)
    return sum(
        (linear if kind.is_linear else item) * number / (ranks if kind.is_divided else 1)
        for kind, number in sizes.weights.items()
    )


def _chunk_rows(sizes: ModelSizes, options: MemoryOptions) -> int:
    item = ITEM_NBYTES[options.dtype]
    rows = max(MIN_CHUNK_ROWS, options.chunk_nbytes // (sizes.vocab_size * item))
    return min(1 << (rows.bit_length() - 1), MAX_CHUNK_ROWS)


def _numbers_of_token(sizes: ModelSizes, ranks: int) -> float:
    """Counts the numbers that are in memory for one token, at the worst place of a layer.

    The residual stream, what goes into the layer, normalised, and out of it, and the states of the pack
    before; and queries, keys, values and what is attended, or the two halves of the MLP and their
    product, with the input and the output of each chosen expert.
    """
    states = 5 * sizes.hidden_size
    attention = max(
        layer.num_heads * (layer.keys.key_size + layer.keys.value_size)
        + layer.keys.num_heads * (layer.keys.key_size + layer.keys.value_size)
        for layer in sizes.layers
    )
    mlp = 3 * sizes.mlp_width / ranks + 2 * sizes.chosen_experts * sizes.hidden_size
    return states + max(attention / ranks, mlp)


def _find_problem(sizes: ModelSizes, ranks: int, options: MemoryOptions) -> str:
    """Says why `serve` would refuse so many ranks."""
    if ranks > 1 and options.quantization != "none":
        try:
            check_undivided(Quantization(options.quantization))
        except ModelError as error:
            return str(error).partition(". ")[0]
    return sizes.undivided.get(ranks, "")
