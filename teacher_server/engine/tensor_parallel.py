"""Divides a teacher among several devices: each holds a part of every layer, and of the vocabulary.

One process drives each device, a rank. All ranks run the same packs; the layers' partial sums are
added up between them (Shoeybi et al. 2019, section 3), by the plan that transformers has for an
architecture. The vocabulary head stays divided too: no rank ever has all logits of a chunk, and
targets are selected from the parts (logit_codec/vocabulary_part.py).
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from logit_codec.vocabulary_part import VocabularyPart
from teacher_server.errors import ModelError

MOST_RANKS = 8
"""Ranks of a teacher: they exchange sums in every layer, which only the links inside of one machine
are fast enough for. More machines are more replicas."""

JOINED_COLUMNS = 256
"""Columns of the hidden size that are gathered at a time."""

HEAD_RULE = {"lm_head": "colwise"}
"""Leaves the logits divided, where transformers' own plan gathers them on every rank."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Says which of several processes this one is; its group of torch.distributed exists."""

    index: int
    count: int


class ExchangedPart(VocabularyPart):
    """Holds a part of the vocabulary, and exchanges tensors through torch.distributed."""

    def gather(self, tensor: Tensor) -> Tensor:
        count = len(self.bounds) - 1
        gathered = tensor.new_empty(count, *tensor.shape)
        dist.all_gather_single(gathered.flatten(0, 1), tensor.contiguous())
        return gathered

    def add(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor


def divide(rank: Rank) -> Any:
    """Returns what makes transformers load the part of a model that this rank holds."""
    from transformers.distributed.configuration_utils import (
        DistributedConfig,  # slow to import, and rarely needed
    )

    return DistributedConfig(tp_size=rank.count, tp_plan=dict(HEAD_RULE))


def check_divisible(config: Any, count: int, *, is_dummy: bool = False) -> None:
    """Raises ModelError, by name, for an architecture that cannot be divided among so many ranks."""
    if is_dummy:
        raise ModelError(
            "random weights (--load-format dummy) are not divided among devices yet: save a model "
            "with save_pretrained, or use --tensor-parallel-size 1"
        )
    text = config.get_text_config()
    name = (config.architectures or [type(config).__name__])[0]
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"{name} cannot be divided among devices: transformers {transformers.__version__} has no "
            "tensor-parallel plan for it. Serve it with --tensor-parallel-size 1. It has plans for "
            f"{', '.join(find_divisible())}."
        )
    for what in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(text, what, None)
        if isinstance(number, int) and number % count:
            fitting = [n for n in range(1, MOST_RANKS + 1) if not number % n]
            raise ModelError(
                f"{name} has {number} {what.removeprefix('num_').replace('_', ' ')}, which cannot be "
                f"divided among {count} devices. Use --tensor-parallel-size "
                f"{' or '.join(map(str, fitting))}."
            )


def find_divisible() -> list[str]:
    """Returns the names of the causal LMs that transformers has a plan for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    found = set()
    for model_type, name in NAMES.items():
        try:
            config = transformers.CONFIG_MAPPING[model_type]
        except Exception:  # one that needs a package that is not there
            continue
        sub_configs: Any = config.sub_configs
        config = sub_configs.get("text_config", config)
        if getattr(config, "base_model_tp_plan", None):
            found.update([name] if isinstance(name, str) else name)
    return sorted(found)


def take_part(causal_lm: Any, rank: Rank) -> ExchangedPart:
    """Checks that a model was divided as planned; returns the part of the vocabulary that is here.

    From here on its linear layers have their own part of the weights as plain tensors: to take them
    out of distributed ones in every layer, each time, costs as much as launching the layers does.
    Raises ModelError.
    """
    from torch.distributed.tensor import DTensor, Shard

    _check_plan(causal_lm)
    head = causal_lm.get_output_embeddings()
    weight = head.weight
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        raise ModelError(
            f"the vocabulary head of {type(causal_lm).__name__} was not divided among the devices. "
            "Serve this teacher with --tensor-parallel-size 1."
        )
    vocab_size = weight.shape[0]
    most = -(-vocab_size // rank.count)
    bounds = tuple(min(most * index, vocab_size) for index in range(rank.count + 1))
    for module in causal_lm.modules():
        if isinstance(module, nn.Linear):
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    own = nn.Parameter(parameter.to_local(), requires_grad=False)
                    module._parameters[name] = own
    part = ExchangedPart(rank.index, bounds)
    if len(head.weight) != part.num_ids:
        raise ModelError(
            f"rank {rank.index} holds {len(head.weight)} ids of {vocab_size}, expected {part.num_ids}"
        )
    return part


def _check_plan(causal_lm: Any) -> None:
    """Raises ModelError for a rule of the plan that no part of the model matches."""
    names = {re.sub(r"\d+", "*", name) for name, _ in causal_lm.named_modules()}
    names |= {re.sub(r"\d+", "*", name) for name, _ in causal_lm.named_parameters()}
    unused = [rule for rule in causal_lm._tp_plan if rule not in names]
    if unused:
        raise ModelError(
            f"{type(causal_lm).__name__} does not match its tensor-parallel plan: nothing in it is "
            f"called {', '.join(sorted(unused))}. Serve it with --tensor-parallel-size 1."
        )


@torch.inference_mode()
def join_head(head: nn.Linear, part: VocabularyPart) -> tuple[Tensor, Tensor | None]:
    """Gathers the (V, D) weights of a divided head and its bias, in the memory of the host."""
    whole = []
    for values in (head.weight, head.bias):
        if values is None:
            whole.append(None)
            continue
        # Columns of the vocabulary come last where a part is gathered.
        rows = values if values.dim() == 2 else values[:, None]
        pieces = [part.whole(some.t()).t().cpu() for some in rows.split(JOINED_COLUMNS, 1)]
        whole.append(torch.cat(pieces, 1).contiguous().view(-1, *values.shape[1:]))
    return whole[0], whole[1]
