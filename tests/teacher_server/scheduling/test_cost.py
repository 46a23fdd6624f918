import pytest
import torch
import transformers
from torch import nn

from teacher_server.engine.loading import prepare
from teacher_server.scheduling.cost import ACCELERATOR, CPU, CostModel
from tests.support import tiny


@pytest.fixture(scope="module")
def prices() -> CostModel:
    return CostModel.of(prepare(tiny.make_model("Gemma2", 1001)).causal_lm)


def test_prices_follow_the_shapes_of_the_model(prices: CostModel) -> None:
    # A layer of the tiny teacher: q 64 * 64, k and v 64 * 32, o 64 * 64, three of 64 * 128.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert prices.per_token_pair == pytest.approx(4 * 4 * 16 * 2 / (2 * weights))
    assert prices.per_row == pytest.approx(1001 * (2 * 64 + 200) / (2 * weights))
    assert prices.per_reply_byte == pytest.approx(1e11 / 3e8 / (2 * weights))


def test_a_cost_grows_with_everything_and_with_length_more_than_in_proportion(
    prices: CostModel,
) -> None:
    base = prices.cost(256, 100, 10_000)
    assert base > 256
    assert prices.cost(512, 100, 10_000) > 2 * prices.cost(256, 100, 10_000) - (base - 256)
    assert prices.cost(256, 200, 10_000) > base
    assert prices.cost(256, 100, 20_000) > base
    pairs = prices.cost(512, 0, 0) - 512
    assert pairs == pytest.approx(4 * (prices.cost(256, 0, 0) - 256))


def test_only_the_experts_that_a_token_uses_are_counted() -> None:
    model = tiny.make_model("Mixtral", 1001)
    prices = CostModel.of(prepare(model).causal_lm)
    config = model.config
    experts = sum(
        weight.numel() for name, weight in model.model.named_parameters() if ".experts." in name
    )
    every = sum(
        weight.numel()
        for name, weight in model.model.named_parameters()
        if weight.dim() > 1 and "embed" not in name
    )
    used = every - experts + experts * config.num_experts_per_tok / config.num_local_experts
    assert experts > 0
    assert prices.per_row == pytest.approx(1001 * (2 * 64 + 200) / (2 * used))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_architecture_has_prices(name: str) -> None:
    with torch.inference_mode():
        prices = CostModel.of(prepare(tiny.make_model(name, 1001)).causal_lm)
    assert 0 < prices.per_token_pair < 0.1
    assert 0.1 < prices.per_row < 10
    assert 0 < prices.per_reply_byte < 0.1


def test_on_an_accelerator_a_row_costs_what_selection_was_measured_at() -> None:
    model = prepare(tiny.make_model("Llama", 1001)).causal_lm
    on_cpu = CostModel.of(model)
    elsewhere = CostModel.of(model.to("meta"))
    assert elsewhere.per_token_pair == on_cpu.per_token_pair
    ratio = (2 * 64 + ACCELERATOR.selection_flops) / (2 * 64 + CPU.selection_flops)
    assert elsewhere.per_row == pytest.approx(on_cpu.per_row * ratio)


def test_a_large_teachers_selection_is_priced_by_its_device() -> None:
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        prices = CostModel.of(transformers.LlamaForCausalLM(config))
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    head = 128_256 * 4096 / weights
    assert prices.per_row == pytest.approx(1.56 * head, rel=0.01)
    assert head == pytest.approx(0.075, rel=0.01)


class PackedLinear(nn.Linear):
    """Holds two weights in a byte, in one column, as bitsandbytes' 4-bit layer does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_packed_weights_count_as_what_they_multiply(name: str) -> None:
    model = tiny.make_model(name, 1001)
    expected = CostModel.of(model)
    for module in list(model.base_model.modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(module, child, PackedLinear(linear))
    assert sum(weight.dtype == torch.uint8 for weight in model.parameters()) > 4
    assert CostModel.of(model) == expected


def test_gpt2_is_priced_by_the_shapes_of_its_own_linear_layer() -> None:
    prices = CostModel.of(tiny.make_model("GPT2", 1001))
    weights = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)
    assert prices.per_row == pytest.approx(1001 * (2 * 64 + 200) / (2 * weights))
