"""What a record takes on disk, and what reading it costs.

Run `python -m benchmarks.record` (--quick: fewer rows and sequences). The rows
are those of benchmarks/distributions.py, the ids are drawn from the teacher. Sequences are random
choices of rows; but for zstd, which would find the repeated ones, each row is used once.

    file           bytes per token of the shards; `ids`, `targets`: of their columns; `rest`: keys,
                   headers and the footer
    with zstd      the same shards if both columns were compressed; how long a shard takes to make
    random read    of one sequence's targets, in a random order: our reader, and `datasets` on a copy
                   that it made from the shards, with what Python has to be done to get at the bytes
    decode         of one sequence
    replay         tokens/s of `Recorded(folder).stream_batches`, shuffled, to targets in batches

Times are CPU time of all threads of the process, of the best of a few runs; torch has one thread.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.distributions import Distributions
from logit_codec import Targets, decode, encode_parts, ids_digest, parse_targets, select
from student_trainer import Recorded
from student_trainer.record.folder import Folder
from student_trainer.record.provenance import Provenance
from student_trainer.record.schema import Row
from student_trainer.record.shards import Shards
from student_trainer.record.writer import Writer, encode_shard

VOCABULARY, ENTROPY, NOISE = 32_768, 1.5, 2.0
"""As in benchmarks/codec.py."""
SPECS = ("sampled:64", "top_k:min_p=1/256,max_k=128,bits=7")
BATCH = 16
SHARDS = 2
PART_NBYTES = 1 << 20


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description="What a record takes, and what reading it costs.")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--quick", action="store_true", help="few rows and sequences")
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_rows, count = (1024, 64) if args.quick else (4096, 1024)
    targets, ids = make_rows(num_rows)
    found = [measure(spec, targets[spec], ids, count, args.tokens) for spec in SPECS]
    print(
        f"\nV = {VOCABULARY:,}, {count:,} sequences of {args.tokens} tokens, mean entropy {ENTROPY} "
        f"nats, {num_rows:,} rows to choose from"
    )
    print(f"{'':<44}" + "".join(f"{spec.partition(',')[0]:>24}" for spec in SPECS))
    for name in found[0]:
        print(f"{name:<44}" + "".join(f"{one[name]:>24}" for one in found))


def make_rows(num_rows: int) -> tuple[dict[str, Targets], Tensor]:
    """Targets of each spec for as many rows, and the (num_rows,) ids that really came next."""
    source = Distributions(VOCABULARY, ENTROPY, NOISE)  # trains a teacher if there is none yet
    parts: dict[str, list[Targets]] = {spec: [] for spec in SPECS}
    realized = []
    generator = torch.Generator().manual_seed(0)
    for chunk in source.chunks(0, num_rows):
        u = torch.rand(len(chunk.logits), generator=generator, dtype=torch.float64)
        for spec, some in parts.items():
            some.append(select(chunk.logits, spec, uniforms=u, realized_ids=chunk.realized))
        realized.append(chunk.realized)
    return {spec: Targets.cat(some) for spec, some in parts.items()}, torch.cat(realized)


def measure(spec: str, targets: Targets, ids: Tensor, count: int, length: int) -> dict[str, str]:
    """One column of the table."""
    provenance = Provenance(
        {
            "model": "benchmark",
            "teacher_fingerprint": "0" * 32,
            "vocab_size": VOCABULARY,
            "format_versions": [1],
        },
        str(parse_targets(spec)),
        1.0,
    )
    rows = make_sequences(spec, targets, ids, count, length)
    tokens = count * (length - 1)
    once = make_sequences(spec, targets, ids, len(targets) // (length - 1), length, once=True)
    once_tokens = len(once) * (length - 1)
    made_s = cpu_s(lambda: encode_shard(once, provenance), 20)
    zstd_s = cpu_s(lambda: encode_shard(once, provenance, compression="zstd"), 20)
    plain = encode_shard(once, provenance)
    squeezed = encode_shard(once, provenance, compression="zstd")
    with tempfile.TemporaryDirectory() as scratch:
        writer = Writer(Folder(scratch), provenance)
        for number in range(SHARDS):
            writer.seal(rows[number::SHARDS])
        files = sorted(Path(scratch).glob("*.parquet"))
        file_nbytes = sum(path.stat().st_size for path in files)
        columns = column_nbytes(files)
        ours_s = cpu_s(lambda: read_ours(Path(scratch), rows)) / count
        theirs_s = read_datasets(files, Path(scratch) / "cache", count)
        decode_s = cpu_s(lambda: [decode(one) for row in rows for one in row.payloads]) / count
        replay_s, clock_s = replay(Path(scratch), rows)
    return {
        "file, bytes per token": f"{file_nbytes / tokens:.2f}",
        "  ids": share(columns["input_ids"], file_nbytes, tokens),
        "  targets": share(columns["targets"], file_nbytes, tokens),
        "  rest": share(file_nbytes - sum(columns.values()), file_nbytes, tokens),
        "with zstd, bytes per token": f"{squeezed.size / once_tokens:.2f}"
        f" ({squeezed.size / plain.size - 1:+.1%})",
        "making a shard, us per 1,000 tokens": f"{made_s / once_tokens * 1e9:.0f}",
        "making it with zstd": f"{zstd_s / once_tokens * 1e9:.0f}",
        "reading all of it, us per 1,000 tokens": f"{read_all(plain) / once_tokens * 1e9:.0f}",
        "reading it with zstd": f"{read_all(squeezed) / once_tokens * 1e9:.0f}",
        "random read, us per sequence: ours": f"{ours_s * 1e6:.0f}",
        "  datasets": f"{theirs_s * 1e6:.0f}" if theirs_s else "not installed",
        "decode, us per sequence": f"{decode_s * 1e6:.0f}",
        "replay, tokens/s per core": f"{tokens / replay_s:,.0f}",
        "  by the clock": f"{tokens / clock_s:,.0f}",
    }


def make_sequences(
    spec: str, targets: Targets, ids: Tensor, count: int, length: int, *, once: bool = False
) -> list[Row]:
    """Rows of a record: each sequence is a random choice of the targets' rows, or the next ones."""
    generator = torch.Generator().manual_seed(1)
    parsed = parse_targets(spec)
    rows = []
    for number in range(count):
        chosen = torch.arange(number * (length - 1), (number + 1) * (length - 1))
        if not once:
            chosen = torch.randint(len(targets), (length - 1,), generator=generator)
        token_ids = torch.cat([torch.tensor([number]), ids[chosen]])
        parts = encode_parts(targets[chosen], parsed, max_nbytes=PART_NBYTES)
        payloads = tuple(payload for _, _, payload in parts)
        key = ids_digest(token_ids)
        rows.append(Row(key, 0, 0, None, token_ids.numpy().astype(np.int32), payloads))
    return rows


def read_ours(folder: Path, rows: Sequence[Row]) -> None:
    """Every sequence once, in a random order."""
    shards = Shards(Folder(folder))
    names = shards.names()
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    for number in order:
        row = rows[number]
        shard, place = names[number % SHARDS], number // SHARDS
        shards.payloads(shard, place, (row.key, row.seed, row.epoch))
    shards.close()


def read_datasets(files: Sequence[Path], cache: Path, count: int) -> float | None:
    """Seconds per sequence, or None without `datasets`."""
    try:
        import datasets
    except ImportError:
        return None
    datasets.disable_progress_bars()
    names = [str(path) for path in files]
    loaded = datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=str(cache))
    assert isinstance(loaded, datasets.Dataset)
    targets = loaded.select_columns(["targets"])
    order = list(range(count))
    random.Random(0).shuffle(order)
    return cpu_s(lambda: [targets[number] for number in order]) / count


def read_all(content: pa.Buffer) -> float:
    """Seconds to read ids and targets of a shard that is in memory."""
    columns = ["input_ids", "targets"]
    return cpu_s(
        lambda: pq.read_table(pa.BufferReader(content), columns=columns, use_threads=False), 20
    )


def replay(folder: Path, rows: Sequence[Row]) -> tuple[float, float]:
    """CPU seconds and seconds of one epoch in a random order."""
    ids = torch.from_numpy(np.stack([row.token_ids for row in rows])).long()
    clock = []
    with Recorded(folder) as record:

        def epoch() -> None:
            order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(len(clock)))
            loader = ({"input_ids": ids[some]} for some in order.split(BATCH))
            started = time.perf_counter()
            num_rows = sum(len(found) for _, found in record.stream_batches(loader, ahead=2))
            clock.append(time.perf_counter() - started)
            assert num_rows == len(ids) * (ids.shape[1] - 1)

        return cpu_s(epoch), min(clock)


def column_nbytes(files: Sequence[Path]) -> dict[str, int]:
    """Of the two large columns, in all files."""
    found = {"input_ids": 0, "targets": 0}
    for path in files:
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                name = column.path_in_schema.partition(".")[0]
                if name in found:
                    found[name] += column.total_compressed_size
    return found


def share(nbytes: int, of: int, tokens: int) -> str:
    return f"{nbytes / tokens:.2f} ({nbytes / of:.0%})"


def cpu_s(work: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds of the best run."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


if __name__ == "__main__":
    main()
