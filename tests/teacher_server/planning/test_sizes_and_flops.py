"""What a plan counts from a config: against hand calculations, real models and torch's own counter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from logit_codec import parse_targets
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import prepare
from teacher_server.errors import ModelError
from teacher_server.planning.flops import count_flops, count_pairs
from teacher_server.planning.memory import MemoryOptions, estimate_memory
from teacher_server.planning.sizes import measure_sizes, read_config
from tests.support.tiny import ARCHITECTURES, make_model

OPTIONS = MemoryOptions(
    dtype="bfloat16",
    quantization="none",
    pack_tokens=8192,
    chunk_nbytes=128 << 20,
    pool_nbytes=1 << 30,
    device_nbytes=80e9,
)


def test_a_llama_like_model_is_counted_as_by_hand():
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        dtype="bfloat16",
    )
    sizes = measure_sizes(config)
    queries, keys, values, out = 48 * 6 * 8, 48 * 2 * 8, 48 * 2 * 8, 6 * 8 * 48
    gate, up, down = 48 * 128, 48 * 128, 128 * 48
    body = 3 * (queries + keys + values + out + gate + up + down)
    assert sizes.count("body") == body
    assert sizes.count("embedding") == sizes.count("head") == 1000 * 48
    assert sizes.count("small") == 3 * 2 * 48 + 48
    assert not sizes.is_tied
    assert sizes.dtype == "bfloat16"

    flops = count_flops(sizes, 100)
    assert flops.body == 2 * body
    assert flops.head == 2 * 1000 * 48
    pairs = 100 * 101 / 2
    assert flops.attention == pytest.approx(3 * 6 * (2 * 8 + 2 * 8) * pairs / 100)
    assert count_flops(sizes, 100, with_head=False).head == 0

    whole = estimate_memory(sizes, 1, OPTIONS)
    assert whole.weights == 2 * (body + 2 * 1000 * 48 + 3 * 2 * 48 + 48)
    assert whole.logits == 1.25 * 1024 * 1000 * 2
    assert whole.key_tokens == (1 << 30) // (3 * 2 * (8 + 8) * 2)
    states = 5 * 48
    assert whole.activations == 8192 * 2 * (states + 3 * 128)
    halves = estimate_memory(sizes, 2, OPTIONS)
    assert halves.weights == 2 * ((body + 2 * 1000 * 48) / 2 + 3 * 2 * 48 + 48)
    assert halves.logits == whole.logits / 2
    assert halves.key_tokens == 2 * whole.key_tokens
    assert not halves.problem
    assert estimate_memory(sizes, 4, OPTIONS).problem == (
        "LlamaConfig has 6 attention heads, which cannot be divided among 4 devices"
    )


def test_a_tied_gemma_2_like_model_is_counted_as_by_hand():
    config = transformers.Gemma2Config(
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=10,
        max_position_embeddings=512,
    )
    sizes = measure_sizes(config)
    attention = 32 * 4 * 16 + 2 * (32 * 2 * 16) + 4 * 16 * 32
    body = 4 * (attention + 3 * 32 * 96)
    assert sizes.is_tied
    assert sizes.count("embedding") == 2000 * 32
    assert sizes.count("head") == 0
    assert sizes.count("body") == body
    assert sizes.count("small") == 4 * 4 * 32 + 32
    assert sizes.num_weights == 2000 * 32 + body + 4 * 4 * 32 + 32

    flops = count_flops(sizes, 64)
    assert flops.head == 2 * 2000 * 32, "the embedding is multiplied with, whoever owns it"
    everything, windowed = 64 * 65 / 2, 10 * 11 / 2 + (64 - 10) * 10
    per_pair = 4 * (2 * 16 + 2 * 16)
    assert flops.attention == pytest.approx(2 * per_pair * (everything + windowed) / 64)
    assert count_flops(sizes, 10).attention == pytest.approx(4 * per_pair * (10 * 11 / 2) / 10)


def test_a_mixtral_like_model_is_counted_as_by_hand():
    config = transformers.MixtralConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    sizes = measure_sizes(config)
    expert = 3 * 32 * 64
    router = 8 * 32
    attention = 4 * 32 * 32
    assert sizes.count("experts") == 2 * 8 * expert
    assert sizes.count("body") == 2 * (attention + router)
    assert sizes.active_weights == 2 * (attention + router + 2 * expert)
    assert count_flops(sizes, 16).body == 2 * 2 * (attention + router + 2 * expert)
    small = 2 * 2 * 32 + 32
    whole = estimate_memory(sizes, 1, OPTIONS)
    everything = 2 * (attention + router + 8 * expert) + 2 * 500 * 32
    assert whole.weights == 2 * (everything + small), "experts that are not chosen are kept too"
    # The router is not divided: every rank chooses.
    halves = estimate_memory(sizes, 2, OPTIONS)
    assert halves.weights == 2 * ((everything - 2 * router) / 2 + 2 * router + small)
    states, chosen = 5 * 32, 2 * (3 * 64 + 2 * 32)
    assert whole.activations == 8192 * 2 * (states + chosen)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "GptOss"])
def test_as_many_weights_are_counted_as_a_real_model_has(architecture: str):
    model = make_model(architecture, 300)
    sizes = measure_sizes(model.config)
    assert sizes.num_weights == sum(weight.numel() for weight in model.parameters())
    head: Any = model.get_output_embeddings()
    assert sizes.is_tied == (model.get_input_embeddings().weight is head.weight)
    assert sizes.head_weights == head.weight.numel()


@pytest.mark.parametrize("architecture", ["Gemma2", "Llama", "Qwen3", "Cohere"])
def test_the_production_engine_does_the_products_that_are_counted(architecture: str):
    """torch counts products; attention on a CPU is an operator of our own, and not among them."""
    model = prepare(make_model(architecture, 300))
    # One sequence of 128 rows and the token after them: whole tiles, so that nothing is padding.
    ids = torch.randint(300, (128,), generator=torch.Generator().manual_seed(0))
    request = RowRequest(ids, torch.arange(127), parse_targets("realized"))
    engine = Engine(model)
    with FlopCounterMode(display=False) as counter:
        engine.score([request])
    flops = count_flops(measure_sizes(model.causal_lm.config), 128)
    assert counter.get_total_flops() == pytest.approx(128 * (flops.body + flops.head), rel=1e-6)


def test_a_models_own_attention_does_the_products_that_are_counted():
    model = make_model("Llama", 300)
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    flops = count_flops(measure_sizes(model.config), 64)
    # Eager attention multiplies all pairs and hides half of them.
    attention = flops.attention * 64 * 64 / count_pairs(64, None)
    expected = 64 * (flops.body + flops.head + attention)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 9), (5, 0)]
)
def test_pairs_are_those_that_a_causal_window_leaves(length: int, window: int | None):
    seen = [
        (query, key)
        for query in range(length)
        for key in range(query + 1)
        if window is None or query - key < window
    ]
    assert count_pairs(length, window) == len(seen)


def test_windows_are_those_that_a_model_attends_with():
    def windows(config: transformers.PreTrainedConfig) -> list[int | None]:
        return [layer.window for layer in measure_sizes(config).layers]

    small: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    assert windows(transformers.MistralConfig(**small, sliding_window=9)) == [9] * 4
    assert windows(transformers.Qwen2Config(**small, sliding_window=9)) == [None] * 4
    used = transformers.Qwen2Config(
        **small, sliding_window=9, use_sliding_window=True, max_window_layers=3
    )
    assert windows(used) == [None, None, None, 9]
    assert windows(transformers.Gemma2Config(**small, sliding_window=9)) == [9, None, 9, None]


def test_experts_are_found_whatever_their_name():
    small: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 50}
    deepseek = transformers.DeepseekV3Config(
        **small,
        intermediate_size=80,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=12,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    sizes = measure_sizes(deepseek)
    assert sizes.count("experts") == 1 * 8 * (3 * 32 * 16), "the first layer is dense"
    # Keys of a head are 8 + 4 wide, values 12.
    assert count_flops(sizes, 1).attention == 2 * 4 * (2 * (8 + 4) + 2 * 12)
    qwen = transformers.Qwen3MoeConfig(
        **small,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    assert measure_sizes(qwen).count("experts") == 2 * 4 * (3 * 32 * 16)
    assert (measure_sizes(qwen).num_experts, measure_sizes(qwen).chosen_experts) == (4, 2)


def test_packed_weights_take_fewer_bytes_but_for_embedding_and_head():
    sizes = measure_sizes(make_model("Llama", 300).config)
    linear, rest = sizes.count("body"), sizes.count("embedding", "head", "small")

    def weights(quantization: str) -> float:
        return estimate_memory(sizes, 1, replace(OPTIONS, quantization=quantization)).weights

    assert weights("none") == 2 * (linear + rest)
    assert weights("torchao-int8") == linear + 2 * rest
    assert weights("bitsandbytes-4bit") == 0.5625 * linear + 2 * rest
    assert weights("compressed-tensors") == weights("none"), "they are unpacked"
    packed = estimate_memory(sizes, 2, replace(OPTIONS, quantization="torchao-int8"))
    assert "cannot be divided among devices yet" in packed.problem


def test_what_has_no_plan_is_not_divided():
    sizes = measure_sizes(make_model("GPT2", 300).config)
    assert estimate_memory(sizes, 1, OPTIONS).problem == ""
    assert "GPT2Config cannot be divided" in estimate_memory(sizes, 2, OPTIONS).problem


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_config(str(tmp_path))
    with pytest.raises(ModelError, match="there is no folder"):
        read_config(str(tmp_path / "missing"))
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(ModelError, match=r"cannot read the config\.json"):
        read_config(str(tmp_path))
