import pytest
import torch

from teacher_server.engine.loading import prepare
from teacher_server.scheduling.cost import CostModel
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
