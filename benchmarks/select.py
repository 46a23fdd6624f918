"""What keeping the top-k of a chunk of logits costs, beside torch.topk of the same logits.

Run `python -m benchmarks.select`, and again with THP_MEM_ALLOC_ENABLE=1 before it (huge pages for
large buffers, which the service turns on): fresh pages are a large part of the time. One thread,
random logits, 64 entries kept; times per row.
"""

import os
import time
from collections.abc import Callable

import torch

from logit_codec import encode, parse_targets, select

SHAPES = ((1024, 1_024), (256, 32_000), (64, 262_144))  # rows, vocabulary
SPEC = parse_targets("top_k:64")


def main() -> None:
    """Measures and prints the table."""
    torch.set_num_threads(1)
    print(f"huge pages: {os.environ.get('THP_MEM_ALLOC_ENABLE') == '1'}; microseconds per row")
    print("vocabulary  torch.topk(64)  softmax  select  of topk  select+encode")
    for rows, vocabulary in SHAPES:
        torch.manual_seed(0)
        logits = torch.randn(rows, vocabulary) * 3
        realized = torch.zeros(rows, dtype=torch.int64)

        def kept(logits=logits, realized=realized):
            return select(logits, SPEC, realized_ids=realized)

        topk = microseconds(lambda logits=logits: logits.topk(64)) / rows
        softmax = microseconds(lambda logits=logits: logits.softmax(1)) / rows
        selecting = microseconds(kept) / rows
        encoding = microseconds(lambda kept=kept: encode(kept())) / rows
        print(
            f"{vocabulary:10,}  {topk:14.1f}  {softmax:7.1f}  {selecting:6.1f}  "
            f"{selecting / topk:6.2f}x  {encoding:13.1f}"
        )


def microseconds(work: Callable[[], object], repeats: int = 9) -> float:
    """Median time of one call."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * sorted(times)[repeats // 2]


if __name__ == "__main__":
    main()
