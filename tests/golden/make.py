"""Writes the golden containers: `python -m tests.golden.make`. Only for a new format version."""

from pathlib import Path

import torch

from logit_codec import DenseTargets, Targets, TopKTargets, encode

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


CASES: dict[str, tuple[Targets, int]] = {
    "top_k_v1.bin": (
        top_k(
            realized_logprob=torch.tensor([-0.6931472, -INF]),
            entropy=torch.tensor([1.25, 0.5]),
            log_z=torch.tensor([10.5, -0.25]),
        ),
        7,
    ),
    "top_k_16bit_v1.bin": (top_k(), 16),
    "dense_f32_v1.bin": (dense(torch.float32, log_z=torch.tensor([1.5, 2.5, -3.0])), 7),
    "dense_bf16_v1.bin": (
        dense(
            torch.bfloat16,
            realized_logprob=torch.tensor([-1.3862944, 0.0, -INF]),
            entropy=torch.tensor([1.0397208, 0.0, 0.3767702]),
        ),
        7,
    ),
}
"""File name -> the targets, and the bits that encode is given (7 is its default)."""


def main() -> None:
    for name, (targets, bits) in CASES.items():
        (FOLDER / name).write_bytes(encode(targets, bits=bits))


if __name__ == "__main__":
    main()
