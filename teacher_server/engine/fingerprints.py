"""Computes the fingerprint of weights that are in memory, or made of a config; of those on disk see
weight_files.py."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from teacher_server.engine.quantization import plain_tensors


def fingerprint_dummy(config: Any, seed: int) -> str:
    """Hashes what random weights are made of: that they are random, the seed and the config."""
    content = {"format": "dummy", "seed": seed, "config": without_names(config)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def without_names(config: Any) -> dict[str, Any]:
    """Returns what a config says about arithmetic: softcaps, windows, scales, but no versions."""
    volatile = {"_name_or_path", "transformers_version", "architectures", "use_cache"}
    return {name: value for name, value in config.to_dict().items() if name not in volatile}


def fingerprint_state(causal_lm: nn.Module) -> str:
    """Hashes names, shapes and contents of a model in memory (SHA-256)."""
    digest = hashlib.sha256()
    for name, content in _state_bytes(causal_lm):
        digest.update(name.encode())
        digest.update(content)
    return digest.hexdigest()


def _state_bytes(causal_lm: nn.Module) -> Iterator[tuple[str, memoryview]]:
    for name, whole in sorted(causal_lm.state_dict().items()):
        for tensor in plain_tensors(whole):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield f"{name}:{tuple(tensor.shape)}:{tensor.dtype}", memoryview(raw.numpy())
