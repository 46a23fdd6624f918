"""Counts the weights of a model by what they are for, from its config.json alone.

The model is built on torch's meta device, where tensors have shapes and no memory: what is counted is
what transformers would load.

Letters: D hidden size, V vocabulary, E experts.
"""

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import transformers
from torch import nn

from logitstream.logs import first_line
from teacher_server.engine.key_pool import KeyShape
from teacher_server.engine.tensor_parallel import check_divisible
from teacher_server.errors import ModelError

Part = Literal["embedding", "head", "body", "experts", "small", "outside"]
"""embedding: looked up. head: a head with weights of its own. body: multiplied with every token.
experts: multiplied with the tokens that choose them. small: norms and biases. outside: not of the text
model, such as an encoder of images."""

PARTS: tuple[Part, ...] = get_args(Part)
RANKS = (1, 2, 4, 8)
"""Numbers of GPUs per replica that are tried."""
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)


class Kind(NamedTuple):
    """Says what weights are for, and what can be done with them."""

    part: Part
    is_divided: bool
    """Whether ranks of tensor parallel share them; else each has all of them."""
    is_linear: bool
    """Whether they are of an nn.Linear, which `--quantization` packs."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Describes the attention of one layer."""

    num_heads: int
    keys: KeyShape
    """What is kept of each token; sizes are of one head."""
    window: int | None
    """Tokens that a token sees, itself among them; None: all before it; 0: the layer has none."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Holds what a plan needs to know of a model."""

    architecture: str
    weights: dict[Kind, int]
    hidden_size: int
    """D."""
    vocab_size: int
    """V, the rows of the head."""
    is_tied: bool
    """Whether the head multiplies with the embedding."""
    num_experts: int
    """E; 0: there are none."""
    chosen_experts: int
    layers: tuple[Attention, ...]
    mlp_width: int
    """Numbers between the two halves of a layer's MLP, for one token: of its chosen experts together."""
    max_sequence_tokens: int
    dtype: str
    is_dtype_known: bool
    undivided: dict[int, str]
    """Why the model cannot be divided among some numbers of ranks; the others can be served."""

    @property
    def num_weights(self) -> int:
        return sum(self.weights.values())

    def count(self, *parts: Part) -> int:
        """Counts the weights of some parts."""
        return sum(number for kind, number in self.weights.items() if kind.part in parts)

    @property
    def head_weights(self) -> int:
        """Weights that a row of logits is multiplied with, whether they are its own or not."""
        return self.vocab_size * self.hidden_size

    @property
    def active_weights(self) -> float:
        """Weights of the body that one token is multiplied with."""
        share = self.chosen_experts / self.num_experts if self.num_experts else 0.0
        return self.count("body") + share * self.count("experts")


def read_config(model: str, revision: str | None = None) -> Any:
    """Reads config.json of a folder or of the hub. Raises ModelError."""
    path = Path(model)
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{model} has no config.json. Give a folder that has one, or a hub id.")
    if not path.is_dir() and (path.is_absolute() or model.startswith((".", "~"))):
        raise ModelError(
            f"there is no folder {model}. Give a folder with a config.json, or a hub id."
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            str(path) if path.is_dir() else model, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # the hub client and configs fail in any way; all mean the same here
        raise ModelError(
            f"cannot read the config.json of {model}: {first_line(error)} Give a folder that has one "
            "of an architecture of transformers, or a hub id."
        ) from error


def build(config: Any) -> Any:
    """Builds the causal LM of a config without memory for its weights. Raises ModelError."""
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise ModelError(
            f"transformers cannot build a causal LM from this config.json: {first_line(error)}"
        ) from error


def measure_sizes(config: Any) -> ModelSizes:
    """Counts the weights of the model that a config describes. Raises ModelError."""
    causal_lm = build(config)
    text = config.get_text_config()
    head = causal_lm.get_output_embeddings()
    if head is None or causal_lm.base_model is causal_lm:
        raise ModelError(f"{type(causal_lm).__name__} has no vocabulary head apart from its base")
    num_experts = _first(text, NUM_EXPERTS) or 0
    if num_experts < 2:
        num_experts = 0
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    weights = _count_weights(causal_lm, head)
    chosen = _first(text, CHOSEN_EXPERTS) or 0
    if num_experts and not chosen:
        raise ModelError(
            f"config.json says {num_experts} experts and not how many of them a token uses; known "
            f"names are {', '.join(CHOSEN_EXPERTS)}"
        )
    return ModelSizes(
        architecture=type(causal_lm).__name__,
        weights=weights,
        hidden_size=head.weight.shape[1],
        vocab_size=head.weight.shape[0],
        is_tied=head.weight is causal_lm.get_input_embeddings().weight,
        num_experts=num_experts,
        chosen_experts=chosen if num_experts else 0,
        layers=describe_layers(text),
        mlp_width=_find_mlp_width(text, chosen if num_experts else 0),
        max_sequence_tokens=getattr(text, "max_position_embeddings", None) or 2**20,
        dtype=str(dtype or "float32").removeprefix("torch."),
        is_dtype_known=dtype is not None,
        undivided={ranks: why for ranks in RANKS[1:] if (why := _why_undivided(config, ranks))},
    )


def _why_undivided(config: Any, ranks: int) -> str:
    try:
        check_divisible(config, ranks)
    except ModelError as error:
        return str(error).partition(". ")[0]
    return ""


def _count_weights(causal_lm: Any, head: nn.Module) -> dict[Kind, int]:
    decoder = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else causal_lm.base_model
    inside = {id(module) for module in decoder.modules()}
    patterns = [
        name
        for name, rule in (getattr(causal_lm, "_tp_plan", None) or {}).items()
        if not rule.startswith(("replicated", "moe_tp_experts"))
    ]
    counts: Counter[Kind] = Counter()
    seen: set[int] = set()
    for name, module in causal_lm.named_modules():
        for own_name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue  # tied
            seen.add(id(weight))
            full_name = f"{name}.{own_name}"
            part = _part_of(full_name, module, weight, head, is_inside=id(module) in inside)
            # A tied head is divided, and the embedding with it.
            is_divided = weight is head.weight or any(
                fnmatch.fnmatchcase(each, pattern)
                for pattern in patterns
                for each in (name, full_name)
            )
            is_linear = part in ("body", "experts") and isinstance(module, nn.Linear)
            counts[Kind(part, is_divided, is_linear)] += weight.numel()
    return dict(counts)


def _part_of(
    name: str, module: nn.Module, weight: nn.Parameter, head: nn.Module, *, is_inside: bool
) -> Part:
    if module is head:
        return "head" if weight.dim() > 1 else "small"
    if not is_inside:
        return "outside"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if weight.dim() < 2 or name.endswith("bias"):
        return "small"
    return "experts" if ".experts." in name else "body"


def _first(config: Any, names: Sequence[str]) -> int | None:
    """Returns the first of some values that a config has."""
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if isinstance(value, int)), None)


def describe_layers(text: Any) -> tuple[Attention, ...]:
    """Describes the attention of each layer of a text model's config. Raises ModelError."""
    count, heads = text.num_hidden_layers, text.num_attention_heads
    if not isinstance(heads, int):
        raise ModelError(
            "the layers of this model have different numbers of heads, which plan does not count yet"
        )
    if getattr(text, "kv_lora_rank", None):  # DeepSeek: keys and values of every head are unpacked
        key_size = text.qk_nope_head_dim + text.qk_rope_head_dim
        shape = KeyShape(heads, key_size, text.v_head_dim)
    else:
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        shape = KeyShape(getattr(text, "num_key_value_heads", None) or heads, size, size)
    return tuple(Attention(heads, shape, window) for window in _find_windows(text, count))


def _find_windows(text: Any, count: int) -> list[int | None]:
    sliding = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", None) is False:
        sliding = None
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return [sliding] * count
    windows: dict[str, int | None] = {
        "full_attention": None,
        "sliding_attention": sliding,
        "chunked_attention": getattr(text, "attention_chunk_size", None),
    }
    # Linear attention and state spaces cost what their weights cost, whatever the length.
    return [windows.get(kind, 0) for kind in kinds]


def _find_mlp_width(text: Any, chosen: int) -> int:
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    dense = _first(text, names) or 4 * text.hidden_size
    if not chosen:
        return dense
    each = _first(text, ("moe_intermediate_size", "expert_ffn_hidden_size")) or dense
    return chosen * each
