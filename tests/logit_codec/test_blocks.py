"""Where the mass of a row lies: block by block, for rows that float32 can hardly hold."""

import pytest
import torch

from logit_codec import blocks, select
from logit_codec.blocks import BLOCK, RowMasses, block_logits


def wide(rows: int, columns: int, span: float, seed: int = 0) -> torch.Tensor:
    """(rows, columns) logits whose probabilities span exp(span)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator).neg_().mul_(span)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_cpu_meets_no_denormal_numbers_which_would_make_it_several_times_slower(temperature):
    logits = wide(3, 1000, 200.0)
    peaks = logits.amax(1, keepdim=True)
    weights = blocks.exp_of_differences(logits, peaks, temperature, out=torch.empty_like(logits))
    assert float(weights.min()) >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shares_are_those_of_float64_and_of_no_mass_is_none(columns, dtype):
    logits = wide(4, columns, 100.0).to(dtype)
    logits[1, 1:] = -torch.inf
    logits[2, : columns - 1] = -torch.inf
    masses = RowMasses.of(logits, 1.5, entropy=True, maxima=True)
    shares, entropy = masses.shares_RB, masses.entropy_R
    p = (logits.double() / 1.5).softmax(1)
    wanted = torch.nn.functional.pad(p, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2)
    torch.testing.assert_close(shares, wanted, rtol=1e-5, atol=1e-30)
    assert (shares[wanted == 0] == 0).all()
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(1), rtol=1e-5, atol=1e-6)
    log_z = (logits.double() / 1.5).logsumexp(1)
    torch.testing.assert_close(masses.log_z_R, log_z, rtol=1e-6, atol=1e-6)
    padded = torch.nn.functional.pad(logits.float(), (0, -columns % BLOCK), value=-torch.inf)
    assert torch.equal(masses.maxima_RB, padded.unflatten(1, (-1, BLOCK)).amax(2))
    assert torch.equal(masses.peak_R, logits.float().amax(1))


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_gathered_with_each_column_once(columns, dtype):
    logits = wide(4, columns, 100.0).to(dtype)
    count = blocks.num_blocks(columns)
    for rows in (logits, logits[1:3], logits[:1].expand(3, -1), logits.repeat(1, 2)[:, :columns]):
        all_blocks = torch.arange(count).expand(len(rows), -1)
        values, first = block_logits(rows, all_blocks)
        ids = first[:, :, None] + torch.arange(BLOCK)
        for row in range(len(rows)):
            there = (values[row] > -torch.inf) & (ids[row] < columns)
            assert ids[row][there].tolist() == list(range(columns))
            assert torch.equal(values[row][there], rows[row].float())
            assert int(there.sum()) == int((values[row] > -torch.inf).sum())


@pytest.mark.parametrize("above", [0.0, 40.0, 80.0, 85.0, 88.0, 89.0, 300.0, 1e30])
@pytest.mark.parametrize("columns", [1100, 5000])
def test_a_row_whose_peak_is_not_among_its_first_columns_is_as_exact_as_any_other(columns, above):
    logits = wide(5, columns, 30.0)
    logits[1, columns - 3] = above
    logits[2, :1024] = -torch.inf
    logits[3] = -torch.inf
    logits[4, 1050] = torch.nan
    masses = RowMasses.of(logits, 1.0, entropy=True)
    shares, entropy = masses.shares_RB, masses.entropy_R
    p = logits.double().softmax(1)
    wanted = torch.nn.functional.pad(p, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2)
    torch.testing.assert_close(shares[:3], wanted[:3], rtol=1e-5, atol=1e-30)
    assert shares[3:].isnan().any(1).all()
    assert entropy is not None
    torch.testing.assert_close(entropy[:3], torch.special.entr(p[:3]).sum(1), rtol=1e-5, atol=1e-5)
    alone = RowMasses.of(logits[1:2], 1.0)
    assert torch.equal(alone.shares_RB[0], shares[1])
    assert torch.equal(alone.log_z_R[0], masses.log_z_R[1])


@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(wide(3, 20_000, 1e-3), id="flat"),
        pytest.param(wide(3, 20_000, 60.0), id="wide"),
        pytest.param(torch.cat([wide(2, 20_000, 1.0), wide(1, 20_000, 900.0)]), id="both"),
        pytest.param(wide(3, 20_000, 20.0).round(), id="tied"),
        pytest.param(wide(3, 20_000, 20.0).index_fill(1, torch.arange(9), 300.0), id="peaked"),
    ],
)
def test_the_likeliest_are_found_whichever_way_they_are_looked_for(logits):
    for k in (1, 16, 64):
        targets = select(logits, f"top_k:{k},realized=0", temperature=1.3)
        ids = logits.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
        for row, wanted in enumerate(ids):
            kept = targets.token_ids[targets.row_splits[row] : targets.row_splits[row + 1]]
            assert torch.equal(kept, wanted)
