"""Tiny teachers with seeded weights, one per supported architecture, and their dense oracle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

CONTEXT = 256
ARCHITECTURES = ("Gemma2", "Llama", "Qwen3", "GPT2", "Mixtral", "Cohere", "Granite", "Gemma3")
DENSE_ARCHITECTURES = tuple(name for name in ARCHITECTURES if name != "Mixtral")


def make_model(
    name: str,
    vocab_size: int,
    seed: int = 0,
    *,
    hidden_size: int = 64,
    context: int = CONTEXT,
    **changes: Any,
) -> transformers.PreTrainedModel:
    """A 2-layer causal LM with livelier logits than a fresh one has.

    One of ARCHITECTURES, or "GptOss" (sparse experts, and attention with sinks). changes: values of
    the configuration.
    """
    torch.manual_seed(seed)
    head_dim = hidden_size // 4
    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    windowed = {"head_dim": head_dim, "sliding_window": 32} | common
    configs: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
        "Gemma2": lambda: transformers.Gemma2Config(
            **{"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0} | windowed
        ),
        "Gemma3": lambda: transformers.Gemma3TextConfig(
            **windowed, layer_types=["sliding_attention", "full_attention"]
        ),
        "Llama": lambda: transformers.LlamaConfig(**common),
        "Qwen3": lambda: transformers.Qwen3Config(**common, head_dim=head_dim),
        "GPT2": lambda: transformers.GPT2Config(
            vocab_size=vocab_size,
            n_embd=hidden_size,
            n_layer=2,
            n_head=4,
            n_positions=context,
            bos_token_id=0,
            eos_token_id=1,
        ),
        "Mixtral": lambda: transformers.MixtralConfig(**common, num_local_experts=4),
        "Cohere": lambda: transformers.CohereConfig(**common, logit_scale=0.0625),
        "Granite": lambda: transformers.GraniteConfig(
            **common, logits_scaling=8.0, embedding_multiplier=12.0
        ),
        "GptOss": lambda: transformers.GptOssConfig(
            **windowed, num_local_experts=4, num_experts_per_tok=2
        ),
    }
    model = transformers.AutoModelForCausalLM.from_config(configs[name]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4 * (64 / hidden_size) ** 0.5)
            elif name.endswith("sinks"):
                parameter.normal_()
    return model.eval()


def save_model(folder: Path, name: str, vocab_size: int, seed: int = 0) -> Path:
    """A tiny teacher as an ordinary Hugging Face folder, without a tokenizer."""
    make_model(name, vocab_size, seed).save_pretrained(folder)
    return folder


def make_student(*, dropout: float = 0.0) -> transformers.PreTrainedModel:
    """A tiny GPT-2 with tied embeddings and fixed weights, for a vocabulary of 64."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), dropout),
    )
    return transformers.GPT2LMHeadModel(config)


def random_sequences(count: int, vocab_size: int, seed: int = 0) -> list[Tensor]:
    """Sequences of 2 to CONTEXT random ids, (L,) int64 each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, CONTEXT + 1, (count,), generator=generator)
    return [torch.randint(vocab_size, (int(n),), generator=generator) for n in lengths]


@torch.inference_mode()
def dense_logits(model: transformers.PreTrainedModel, token_ids: Tensor) -> Tensor:
    """(L-1, V) float64: the oracle, the model's own full forward without padding or neighbours."""
    return model(input_ids=token_ids[None]).logits[0, :-1].double()


def make_tokenizer(words: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer with <pad>, <eos> and the given words, ids in this order."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
