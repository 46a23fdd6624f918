"""Hashes that both sides compute alike, so that a wrong pairing is refused at connect."""

import hashlib
import json
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over a tokenizer's sorted (id, token) pairs and its special ids.

    Special are the added tokens marked so and the ones with a name such as bos_token.
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
