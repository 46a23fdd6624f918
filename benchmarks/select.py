"""What a selection costs, beside torch.topk and torch.softmax of the same logits.

Run `python -m benchmarks.select [threads]`, and again with THP_MEM_ALLOC_ENABLE=1 before it (huge
pages for large buffers, which the service turns on): fresh pages are a large part of the time of
softmax. Two kinds of rows: normal logits, flat; and 64 likely ids above noise, as a teacher's are.
Times per row, the least of nine; compaction and encoding run on the CPU in threads of their own
when a device selects. Other checkouts are compared by PYTHONPATH, in turns.
"""

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from logit_codec import encode, parse_targets, select_rows

SHAPES = ((1024, 1_024), (256, 32_000), (48, 262_144))  # rows, vocabulary
SPECS = ("sampled:64", "top_k:64", "top_k:min_p=1/256,max_k=128")


def main() -> None:
    """Measures and prints the table."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    huge = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    print(f"threads: {torch.get_num_threads()}; huge pages: {huge}; microseconds per row")
    print("vocabulary  rows     dtype     spec                         select  compact  encode")
    for rows, vocabulary in SHAPES:
        for name, logits in made_up(rows, vocabulary):
            label = f"{vocabulary:10,}  {name:7}  {str(logits.dtype).removeprefix('torch.'):8}"
            topk = microseconds(lambda logits=logits: logits.topk(64)) / rows
            softmax = microseconds(lambda logits=logits: logits.softmax(1)) / rows
            print(f"{label}  torch.topk(64) {topk:.1f}, torch.softmax {softmax:.1f}")
            for text in SPECS:
                selecting, compacting, encoding = (
                    each / rows for each in parts_of(logits, text, rows)
                )
                print(f"{label}  {text:27} {selecting:7.1f}  {compacting:7.1f} {encoding:7.1f}")


def made_up(rows: int, vocabulary: int) -> list[tuple[str, Tensor]]:
    """Makes logits by name."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(rows, vocabulary, generator=generator) * 3
    likely = torch.randn(rows, 64, generator=generator).sort(1, descending=True).values * 3 + 14
    ids = torch.randint(vocabulary, (rows, 64), generator=generator)
    peaked = torch.randn(rows, vocabulary, generator=generator).scatter_(1, ids, likely)
    return [("flat", flat), ("peaked", peaked), ("peaked", peaked.bfloat16())]


def parts_of(logits: Tensor, text: str, rows: int) -> tuple[float, float, float]:
    """Times the selection, the compaction and the encoding, in microseconds of all rows."""
    spec = parse_targets(text)
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    realized = torch.zeros(rows, dtype=torch.int64)

    def kept():
        return select_rows(logits, spec, uniforms=uniforms, realized_ids=realized)

    selection = kept()
    targets = selection.compact()
    return (
        microseconds(kept),
        microseconds(selection.compact),
        microseconds(lambda: encode(targets)),
    )


def microseconds(work: Callable[[], object], repeats: int = 9) -> float:
    """Least time of one call: a machine that does other work as well only adds to it."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * min(times)


if __name__ == "__main__":
    main()
