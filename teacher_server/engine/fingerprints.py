"""Computes the fingerprint of a teacher's weights, on disk or in memory."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from logitstream.files import cache_folder, write_atomically

logger = logging.getLogger(__name__)

SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint_folder(folder: Path, revision: str) -> str:
    """Hashes the revision and the name, size and content of every safetensors file (SHA-256).

    A file's header is part of its content. The hash of a file is cached by its path, size, inode
    and modification time, so that a restart does not read a large teacher again.
    """
    digest = hashlib.sha256(revision.encode())
    cache_file = cache_folder() / "weights.json"
    try:
        cache = json.loads(cache_file.read_text())
    except (OSError, ValueError, RecursionError):
        cache = None
    cached = cache.items() if isinstance(cache, dict) else ()
    known = {file: sha for file, sha in cached if isinstance(sha, str) and SHA256.fullmatch(sha)}
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        identity = f"{path.resolve()}:{status.st_size}:{status.st_ino}:{status.st_mtime_ns}"
        if identity not in known:
            with path.open("rb") as file:
                known[identity] = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}:{status.st_size}:{known[identity]}\n".encode())
    if known != cache:
        try:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache_file, json.dumps(known))
        except OSError as error:
            logger.warning("cannot cache the hash of the weights: %s", error)
    return digest.hexdigest()


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
    for name, tensor in sorted(causal_lm.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield f"{name}:{tuple(tensor.shape)}:{tensor.dtype}", memoryview(raw.numpy())
