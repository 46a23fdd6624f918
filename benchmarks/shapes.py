"""Folders that hold only the config.json of a model of a known shape, for `--load-format dummy`."""

from pathlib import Path
from typing import Any

LLAMA_31_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "hidden_size": 3584,
    "intermediate_size": 14_336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA_31_8B,
    "gemma-2-9b": GEMMA_2_9B,
    "tiny-llama": {
        **LLAMA_31_8B,
        **TINY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "tiny-gemma-2": {**GEMMA_2_9B, **TINY, "query_pre_attn_scalar": 16, "sliding_window": 32},
}


def make_config(name: str, *, dtype: str = "bfloat16") -> Any:
    """Returns transformers' config of one of SHAPES. Raises KeyError."""
    import transformers

    values = dict(SHAPES[name])
    return transformers.AutoConfig.for_model(values.pop("model_type"), **values, dtype=dtype)


def save_shape(name: str, folder: Path, *, dtype: str = "bfloat16") -> Path:
    """Writes the config.json of one of SHAPES into a new folder of that name; returns it."""
    place = folder / name
    place.mkdir(parents=True)
    make_config(name, dtype=dtype).save_pretrained(place)
    return place
