"""Writes the golden containers: `python -m tests.golden.make`. Only for a new format version."""

from pathlib import Path

import torch

from logit_codec import (
    DenseTargets,
    FeaturesTargets,
    GivenIds,
    GivenIdsTargets,
    HiddenTargets,
    IdTable,
    RealizedTargets,
    SampledTargets,
    Targets,
    TopKTargets,
    encode,
)

FOLDER = Path(__file__).parent
INF = float("inf")


def top_k(**changed: torch.Tensor) -> TopKTargets:
    """Row 0 keeps the ids 3 and 9 with p = 0.25 and 0.5, row 1 the id 10 with p = 0.875."""
    tensors = {
        "row_splits": torch.tensor([0, 2, 3]),
        "token_ids": torch.tensor([3, 9, 10]),
        "logprobs": torch.tensor([-1.3862944, -0.6931472, -0.1335314]),
        "tail_logprob": torch.tensor([-1.3862944, -2.0794415]),
        **changed,
    }
    return TopKTargets(vocab_size=11, temperature=1.0, **tensors)


def sampled(**changed: torch.Tensor) -> SampledTargets:
    """8 draws: row 0 has the ids 3, 700 and 701 with 2, 5 and 1 of them, row 1 the id 9 with 8."""
    tensors = {
        "row_splits": torch.tensor([0, 3, 4]),
        "token_ids": torch.tensor([3, 700, 701, 9]),
        "counts": torch.tensor([2, 5, 1, 8]),
        **changed,
    }
    return SampledTargets(vocab_size=1000, temperature=1.0, num_draws=8, **tensors)


def sparse_top_k() -> TopKTargets:
    """Two rows with the ids of `sampled`; an eighth is left in each."""
    return TopKTargets(
        vocab_size=1000,
        temperature=1.0,
        row_splits=torch.tensor([0, 3, 4]),
        token_ids=torch.tensor([3, 700, 701, 9]),
        logprobs=torch.tensor([-1.3862944, -0.6931472, -2.0794415, -0.1335314]),
        tail_logprob=torch.tensor([-2.0794415, -2.0794415]),
        realized_logprob=torch.tensor([-0.6931472, -INF]),
    )


def id_table() -> IdTable:
    """1,000 ids, the ids from 700 first: 4 buckets of one rank, one of 4, and so on."""
    shifts = torch.tensor([0, 0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 9])
    return IdTable(vocab_size=1000, shifts=shifts, ids=torch.arange(1000).roll(300))


def dense(dtype: torch.dtype, **per_row: torch.Tensor) -> DenseTargets:
    """Three rows over 3 ids: an odd number of values, so that bfloat16 needs padding."""
    logprobs = [
        [-0.6931472, -1.3862944, -1.3862944],
        [0.0, -INF, -INF],
        [-2.0794415, -0.1335314, -INF],
    ]
    return DenseTargets(
        vocab_size=3, temperature=2.0, logprobs=torch.tensor(logprobs).to(dtype), **per_row
    )


def given_ids() -> GivenIds:
    """The ids 3 and 9 for row 0, and 10 for row 1."""
    return GivenIds.of((torch.tensor([0, 2, 3]), torch.tensor([3, 9, 10])))


def given(**changed: torch.Tensor) -> GivenIdsTargets:
    """The ids of `given_ids` with the probabilities of `top_k`."""
    tensors = {
        "row_splits": given_ids().row_splits,
        "token_ids": given_ids().token_ids,
        "logprobs": torch.tensor([-1.3862944, -0.6931472, -0.1335314]),
        "tail_logprob": torch.tensor([-1.3862944, -2.0794415]),
        **changed,
    }
    return GivenIdsTargets(vocab_size=11, temperature=1.0, **tensors)


HEAD = "ab" * 16
"""Fingerprint of a vocabulary head."""

CASES: dict[str, tuple[Targets, int, IdTable | None]] = {
    "top_k_v1.bin": (
        top_k(
            realized_logprob=torch.tensor([-0.6931472, -INF]),
            entropy=torch.tensor([1.25, 0.5]),
            log_z=torch.tensor([10.5, -0.25]),
        ),
        7,
        None,
    ),
    "top_k_16bit_v1.bin": (top_k(), 16, None),
    "top_k_elias_fano_v1.bin": (sparse_top_k(), 7, None),
    "top_k_table_v1.bin": (sparse_top_k(), 8, id_table()),
    "sampled_v1.bin": (sampled(realized_logprob=torch.tensor([-0.6931472, -INF])), 7, None),
    "sampled_table_v1.bin": (sampled(entropy=torch.tensor([1.25, 0.5])), 7, id_table()),
    "dense_f32_v1.bin": (dense(torch.float32, log_z=torch.tensor([1.5, 2.5, -3.0])), 7, None),
    "dense_bf16_v1.bin": (
        dense(
            torch.bfloat16,
            realized_logprob=torch.tensor([-1.3862944, 0.0, -INF]),
            entropy=torch.tensor([1.0397208, 0.0, 0.3767702]),
        ),
        7,
        None,
    ),
    "given_ids_v1.bin": (
        given(
            ranks=torch.tensor([1, 0, 0], dtype=torch.int32),
            realized_logprob=torch.tensor([-0.6931472, -INF]),
            entropy=torch.tensor([1.25, 0.5]),
            log_z=torch.tensor([10.5, -0.25]),
        ),
        16,
        None,
    ),
    "given_ids_f32_v1.bin": (
        given(
            logprobs=torch.tensor([-1.3862944, -INF, -0.1335314]),
            tail_logprob=torch.tensor([-0.2876821, -2.0794415]),
        ),
        32,
        None,
    ),
    "realized_v1.bin": (
        RealizedTargets(
            vocab_size=11,
            temperature=1.0,
            realized_logprob=torch.tensor([-0.6931472, -INF, -100.5]),
        ),
        7,
        None,
    ),
    "hidden_int8_v1.bin": (
        HiddenTargets(
            vocab_size=11,
            temperature=1.0,
            values=torch.tensor([[127, -64, 0], [0, 0, 0]], dtype=torch.int8),
            scale=torch.tensor([0.5, 0.0]),
            head_fingerprint=HEAD,
            realized_logprob=torch.tensor([-0.6931472, -INF]),
        ),
        7,
        None,
    ),
    "hidden_bf16_v1.bin": (
        HiddenTargets(
            vocab_size=11,
            temperature=2.0,
            values=torch.tensor([[1.0, -2.5, 0.0]], dtype=torch.bfloat16),
            head_fingerprint=HEAD,
            log_z=torch.tensor([10.5]),
        ),
        7,
        None,
    ),
    "features_v1.bin": (
        FeaturesTargets(
            vocab_size=11,
            temperature=1.0,
            hidden=torch.arange(12.0).view(2, 2, 3).bfloat16(),
            layers=(0, 7),
            realized_logprob=torch.tensor([-0.6931472, -INF]),
        ),
        7,
        None,
    ),
}
"""File name -> the targets, the bits that encode is given (7 is its default), and the id table."""

ID_TABLE = "id_table_v1.bin"


def main() -> None:
    for name, (targets, bits, table) in CASES.items():
        (FOLDER / name).write_bytes(encode(targets, bits=bits, id_table=table))
    (FOLDER / ID_TABLE).write_bytes(id_table().to_bytes())


if __name__ == "__main__":
    main()
