"""Computes hashes alike on both sides, so that wrong pairings are refused and draws agree."""

import hashlib
import json
from typing import Any

import xxhash
from torch import Tensor


def ids_digest(token_ids: Tensor) -> bytes:
    """Hashes a sequence's ids as little-endian int32, for `uniforms`: XXH3-128, canonical form."""
    return xxhash.xxh3_128_digest(token_ids.cpu().numpy().astype("<i4").tobytes())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hashes a tokenizer's sorted (id, token) pairs and its special ids: SHA-256, in hex.

    Special tokens are added tokens marked as special, and those with a name such as bos_token.
    `tokenizer` is one of transformers (`get_vocab`, `added_tokens_decoder`) or of tokenizers
    (`get_vocab`, `get_added_tokens_decoder`). Raises ValueError for anything else.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise ValueError(
            "a tokenizer of transformers or tokenizers is needed (with get_vocab), got "
            f"{type(tokenizer).__name__}"
        )
    pairs = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
    else:
        added = tokenizer.added_tokens_decoder
    special = {token_id for token_id, token in added.items() if token.special}
    special.update(getattr(tokenizer, "all_special_ids", ()))
    text = json.dumps([pairs, sorted(special)], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
