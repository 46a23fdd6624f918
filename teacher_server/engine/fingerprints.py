"""Computes the fingerprint of a teacher's weights."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from logitstream.files import cache_folder, write_atomically
from teacher_server.engine.model import SHA256

logger = logging.getLogger(__name__)


def _folder_fingerprint(folder: Path, revision: str) -> str:
    """SHA-256 over the revision and the name, size and content hash of every safetensors file.

    A file's header is part of its content. The hash of a file is kept under its path, size,
    inode and time of change, so that a restart does not read a large teacher twice.
    """
    digest = hashlib.sha256(revision.encode())
    cache_file = cache_folder() / "weights.json"
    try:
        cache = json.loads(cache_file.read_text())
    except (OSError, ValueError, RecursionError):
        cache = None
    kept = cache.items() if isinstance(cache, dict) else ()
    known = {one: sha for one, sha in kept if isinstance(sha, str) and SHA256.fullmatch(sha)}
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
            logger.warning("cannot keep the hash of the weights: %s", error)
    return digest.hexdigest()


def _state_fingerprint(causal_lm: nn.Module) -> str:
    """SHA-256 over names, shapes and contents of a model in memory."""
    digest = hashlib.sha256()
    for name, content in _state_bytes(causal_lm):
        digest.update(name.encode())
        digest.update(content)
    return digest.hexdigest()


def _state_bytes(causal_lm: nn.Module) -> Iterator[tuple[str, memoryview]]:
    for name, tensor in sorted(causal_lm.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield f"{name}:{tuple(tensor.shape)}:{tensor.dtype}", memoryview(raw.numpy())
