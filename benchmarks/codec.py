"""What each way to keep a distribution costs, and what it does to the gradient.

Run `python -m benchmarks.codec` (about 10 minutes on one core; --quick takes a few seconds) or with
`--device cuda`; `--only Gemma sampled:64` prints the lines with these words. The distributions are
those of benchmarks/distributions.py, the first of them the demo's teacher as it is.

    bytes     per token: a container of 1,024 rows, header and digest included
    error     root mean square over tokens of |g^ - g|, over that of |g|, g = q - p the gradient of
              the full KL on the student's logits and g^ what the targets give
    angle     between the sums of g^ and of g over all tokens, degrees
    bias      the error of the mean of R draws of the same tokens
    encode    tokens/s, logits (64 MiB of them) to bytes; `of topk`: over torch.topk(64) of the same
              logits. One thread; CPU time, which busy neighbours change less than the clock
    decode    tokens/s, bytes of 1,024 rows to targets, on the CPU
    id bits   per kept id; `floor`: over what the ids' average frequencies alone would allow, each id
              kept independently with its frequency in the rows that the table was fitted to

`published` rows are our reimplementation of a published format, from its public description; they
have no encoder here, so no speed.

A second table says where lines that draw put the mass: how much of it beyond the 64 likeliest ids,
and on the ids of each range of probability, as a multiple of what the teacher puts there.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.distributions import EARLY, LATE, Chunk, Distributions, entropies
from logit_codec import (
    IdTable,
    SparseTargets,
    Targets,
    TopKTargets,
    decode,
    encode,
    expected_inclusions,
    fit_id_table,
    parse_targets,
    select,
)
from logit_codec.ids import code_ids

SETTINGS: list[tuple[int, float | None, float, float, tuple[float, float]]] = [
    (1024, None, 0.0, 0.0, EARLY),
    (32_768, 1.5, 2.0, 0.0, EARLY),
    (262_144, 2.4, 1.5, 0.0, EARLY),
    (262_144, 2.4, 1.5, 0.5, EARLY),
    (262_144, 2.4, 1.5, 0.0, LATE),
]
"""Arguments of Distributions: vocabulary, mean entropy in nats, noise, spread, student."""
OURS = (
    "dense:f32,log_z=0",
    "top_k:64,log_z=0",
    "top_k:min_p=1/256,max_k=128,log_z=0",
    "top_k:top_p=0.95,max_k=128,log_z=0",
    "sampled:16",
    "sampled:64",
    "sampled:256",
)
BANDS = (1.0, 1 / 16, 1 / 256, 1 / 4096, 0.0)
"""Ends of the ranges of probability in the second table."""
HEADINGS = ("p >= 1/16", ">= 1/256", ">= 1/4096", "less")


@dataclass(eq=False)
class Row:
    """One line of the table, and what was added up for it."""

    name: str
    gradient: Callable[[Chunk, Tensor, Tensor], tuple[Tensor, float]]
    """Chunk, student's probabilities, uniforms -> (C, V) gradient; bytes of all rows, if known."""
    spec: str | None = None
    random: bool = False
    nbytes: float = 0.0
    squared: float = 0.0
    total: Tensor | float = 0.0
    bias: float = 0.0
    kept: list[Targets] = field(default_factory=list)
    masses: Tensor | float = 0.0
    """Of a line that draws, summed over the tokens: see `where_mass_is`."""


def main() -> None:
    """Measures and prints a table for each vocabulary."""
    parser = argparse.ArgumentParser(description="What each way to keep a distribution costs.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="the small vocabulary and few rows")
    parser.add_argument("--only", nargs="+", default=[""], help="words of the lines to print")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for setting in SETTINGS[:1] if args.quick else SETTINGS:
        # Made outside of `measure`: it trains the teacher where there is none yet.
        source = Distributions(*setting, device=args.device)
        rows = [row for row in make_rows() if any(word in row.name for word in args.only)]
        measure(source, rows, *((256, 512, 16) if args.quick else (1024, 4096, 256)))


def make_rows() -> list[Row]:
    """The lines of a table."""
    rows = [Row("published: top-k 64, ids and f32, zero", partial(raw, normalise=False))]
    rows += [Row("published: top-k 64, renormalised", partial(raw, normalise=True))]
    rows += [Row("published: RS-KD, 50 draws, 25 bits", rs_kd, random=True)]
    for name, replacement in (("with", True), ("without", False)):
        recipe = partial(gemma, replacement=replacement)
        rows += [Row(f"published: Gemma 3, 256 {name} replacement", recipe, random=True)]
    rows += [Row("published: DistillKit, zero (default)", partial(distillkit, bucket=False))]
    rows += [Row("published: DistillKit, tail bucket", partial(distillkit, bucket=True))]
    exact = partial(distillkit, dtype=torch.float64)
    rows += [Row("DistillKit fitted in float64, zero", partial(exact, bucket=False))]
    rows += [Row("DistillKit fitted in float64, tail bucket", partial(exact, bucket=True))]
    return rows + [Row(text, ours(text), text, random="sampled" in text) for text in OURS]


@torch.inference_mode()
def measure(
    source: Distributions, rows: list[Row], num_rows: int, fit_rows: int, draws: int
) -> None:
    """Both tables. The id table is fitted to rows that are not measured."""
    vocab_size, device = source.vocab_size, source.device
    frequency = torch.zeros(vocab_size, dtype=torch.float64)
    inclusions = torch.zeros(vocab_size, dtype=torch.float64)
    for chunk in source.chunks(2048, fit_rows):
        inclusions += expected_inclusions(chunk.logits)
        frequency += chunk.logits.softmax(1).sum(0).cpu() / fit_rows
    table = fit_id_table(inclusions, fit_rows)

    squared = kl = 0.0
    true_masses = torch.zeros(len(BANDS), dtype=torch.float64)
    entropy: list[Tensor] = []
    total = torch.zeros(vocab_size, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(0)
    for number, chunk in enumerate(source.chunks(0, num_rows)):
        p, q = chunk.logits.softmax(1), chunk.student.softmax(1)
        g = q - p
        squared += float(g.square().sum())
        true_masses += where_mass_is(p, p)
        total += g.sum(0)
        kl += float((p * (chunk.logits.log_softmax(1) - chunk.student.log_softmax(1))).sum())
        entropy.append(entropies(chunk.logits))
        u = torch.rand(len(g), generator=generator, dtype=torch.float64)
        for row in rows:
            found, nbytes = row.gradient(chunk, q, u.to(device))
            row.nbytes += nbytes
            row.squared += float((found - g).square().sum())
            row.total += found.sum(0, dtype=torch.float64)
            if row.random:
                row.masses += where_mass_is(q - found, p)
            if row.spec and (number == 0 or "dense" not in row.spec):
                row.kept.append(kept(chunk, row.spec, u.to(device)).to("cpu"))
        if number == 0:
            few = Chunk(chunk.logits[:8], chunk.student[:8], chunk.realized[:8])
            for row in rows:
                row.bias = bias(row, few, draws if row.random else 1)

    unigram = float(torch.special.entr(frequency).sum()) / math.log(2)
    spread = torch.cat(entropy)
    print(
        f"\nV = {vocab_size:,}, {num_rows:,} tokens, entropy {spread.mean():.2f} nats on average with "
        f"a standard deviation of {spread.std():.2f}, KL to the student {kl / num_rows:.2f} nats; average frequencies have {unigram:.1f} bits; "
        f"table of {len(table.shifts)} buckets from {fit_rows:,} other rows; R = {draws}; {device}"
    )
    print(
        f"{'':<46}{'bytes':>10}{'error':>8}{'angle':>8}{'bias':>8}{'encode':>10}{'of topk':>9}"
        f"{'decode':>11}{'id bits':>9}{'floor':>7}"
    )
    speed_chunk = source.chunk(0, (64 << 20) // (4 * vocab_size))
    for row in rows:
        found = row.total
        assert isinstance(found, Tensor)
        cosine = float(found @ total / (found.norm() * total.norm()))
        quality = (
            f"{math.sqrt(row.squared / squared):8.3f}"
            f"{math.degrees(math.acos(min(1.0, cosine))):8.2f}{row.bias:8.4f}"
        )
        if row.spec is None:
            print(f"{row.name:<46}{row.nbytes / num_rows:10.1f}{quality}")
            continue
        whole = Targets.cat(row.kept)
        for used in (None, table) if isinstance(whole, SparseTargets) else (None,):
            data = encode(whole, bits=code_bits(row.spec), id_table=used)
            encoded, topk = encode_rate(speed_chunk, row.spec, used)
            decoded = rate(lambda data=data: decode(data, id_tables=[table]), len(whole))
            line = (
                f"{row.name + (' +table' if used else ''):<46}{len(data) / len(whole):10.1f}"
                f"{quality}{encoded:10,.0f}{encoded / topk:8.2f}x{decoded:11,.0f}"
            )
            if isinstance(whole, SparseTargets):
                bits, floor = id_bits(whole, used, inclusions)
                line += f"{bits:9.2f}{bits / floor:6.2f}x"
            print(line, flush=True)
    print_masses([row for row in rows if row.random], true_masses, num_rows)


def where_mass_is(target: Tensor, p: Tensor) -> Tensor:
    """Sums (C, V) targets over all rows: beyond the 64 likeliest ids of p, and by the range of p."""
    best = p.topk(64).indices
    masses = [target.sum() - target.gather(1, best).sum()]
    for high, low in pairwise(BANDS):
        within = (p >= low) & ((p < high) | (high == 1.0))
        masses.append(target.where(within, 0.0).sum())
    return torch.stack(masses).double().cpu()


def print_masses(rows: list[Row], true_masses: Tensor, num_rows: int) -> None:
    """The second table."""
    if not rows:
        return
    print(f"{'':<46}{'beyond id 64':>14}" + "".join(f"{heading:>12}" for heading in HEADINGS))
    shares = true_masses / num_rows
    print(
        f"{'the teacher':<46}{shares[0]:14.1%}" + "".join(f"{share:12.1%}" for share in shares[1:])
    )
    for row in rows:
        assert isinstance(row.masses, Tensor)
        times = row.masses / true_masses
        print(
            f"{row.name:<46}{row.masses[0] / num_rows:14.1%}"
            + "".join(f"{each:11.3f}x" for each in times[1:]),
            flush=True,
        )


def ours(text: str) -> Callable[[Chunk, Tensor, Tensor], tuple[Tensor, float]]:
    bits = code_bits(text)

    def gradient(chunk: Chunk, q: Tensor, u: Tensor) -> tuple[Tensor, float]:
        targets = kept(chunk, text, u)
        targets = decode(encode(targets, bits=bits)).to(q.device)
        p = targets.to_dense()
        if isinstance(targets, TopKTargets):
            p = with_tail(p, q, targets.tail_logprob.exp())
        return q - p, 0.0

    return gradient


def code_bits(text: str) -> int:
    """Returns the bits of each logprob of top_k; encode ignores them for other kinds."""
    return parse_targets(text).code_bits


def kept(chunk: Chunk, text: str, u: Tensor) -> Targets:
    return select(chunk.logits, text, uniforms=u, realized_ids=chunk.realized)


def with_tail(p: Tensor, q: Tensor, tail: Tensor) -> Tensor:
    """The target that a tail bucket stands for: what is not kept has the student's own shape."""
    others = q.masked_fill(p > 0, 0.0)
    return p + others * (tail / others.sum(1).clamp(min=1e-30))[:, None]


def raw(chunk: Chunk, q: Tensor, _: Tensor, *, normalise: bool) -> tuple[Tensor, float]:
    """64 ids and float32 logprobs; what is not kept counts as 0, or the kept is made to sum to 1."""
    best = chunk.logits.softmax(1).topk(64)
    p = torch.zeros_like(q).scatter_(1, best.indices, best.values)
    mass = p.sum(1, keepdim=True)
    if normalise:
        p, mass = p / mass, torch.ones_like(mass)
    return mass * q - p, 64 * 8.0 * len(q)


def rs_kd(chunk: Chunk, q: Tensor, _: Tensor) -> tuple[Tensor, float]:
    """Random sampling KD (arXiv:2503.16870): N independent draws, 25 bits for each distinct id."""
    drawn = torch.multinomial(chunk.logits.softmax(1), 50, replacement=True)
    p = torch.zeros_like(q).scatter_add_(1, drawn, torch.full_like(drawn, 1 / 50, dtype=q.dtype))
    return q - p, int((p > 0).sum()) * 25 / 8


def gemma(chunk: Chunk, q: Tensor, _: Tensor, *, replacement: bool) -> tuple[Tensor, float]:
    """The recipe of Gemma 3 (arXiv:2503.19786, section 2.2): 256 draws by the teacher's probability.

    The target is the teacher's probability of the ids that were drawn, zero for all others, and
    renormalised. The report says neither whether an id may be drawn twice nor how the targets are
    stored: here bits(V - 1) for an id and 16 for its logprob.
    """
    p = chunk.logits.softmax(1)
    drawn = torch.multinomial(p, 256, replacement=replacement)
    target = torch.zeros_like(p).scatter_(1, drawn, p.gather(1, drawn))
    nbytes = int((target > 0).sum()) * ((q.shape[1] - 1).bit_length() + 16) / 8
    return q - target / target.sum(1, keepdim=True), nbytes


def distillkit(
    chunk: Chunk, q: Tensor, _: Tensor, *, bucket: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """The recommended setting of arcee-ai/DistillKit's README, as its compression/ and lossfuncs/ do it.

    k=128: ids of bits(V - 1) bits; the 16 best logprobs as bfloat16; the others by a least-squares
    polynomial in their place 0 to 111, terms 0 to 4 and the square root, six float32. They are
    fitted in float32 by an SVD, which the fourth power leaves little of; `dtype` fits in another.
    `missing_probability_handling` is `zero` by default: the kept logprobs are made to sum to 1.
    `symmetric_uniform` puts what is left into one bucket on both sides.
    """
    best = chunk.logits.log_softmax(1).topk(128)
    place = torch.arange(128 - 16, dtype=dtype, device=q.device)
    terms = torch.stack([place**power for power in (0, 1, 2, 3, 4)] + [place.sqrt()], 1)
    left, singular, right = torch.linalg.svd(terms, full_matrices=False)
    inverse = torch.where(singular > 1e-5, 1 / singular, 0.0)
    coefficients = ((best.values[:, 16:].to(dtype) @ left) * inverse) @ right
    curve = (coefficients @ terms.T).float()
    logprobs = torch.cat([best.values[:, :16].bfloat16().float(), curve], 1)
    if not bucket:
        logprobs = logprobs.log_softmax(1)
    p = torch.zeros_like(q).scatter_(1, best.indices, logprobs.exp())
    if bucket:
        p = with_tail(p, q, (1 - p.sum(1)).clamp(min=0.0))
    width = (q.shape[1] - 1).bit_length()
    nbytes = (math.ceil(128 * width / 8) + 16 * 2 + 6 * 4) * len(q)
    return p.sum(1, keepdim=True) * q - p, nbytes


def bias(row: Row, chunk: Chunk, draws: int) -> float:
    """|mean of g^ - g| over |g| for a few tokens; the draws have independent u."""
    p, q = chunk.logits.softmax(1), chunk.student.softmax(1)
    generator = torch.Generator().manual_seed(1)
    mean = torch.zeros_like(q)
    for _ in range(draws):
        u = torch.rand(len(q), generator=generator, dtype=torch.float64).to(q.device)
        mean += row.gradient(chunk, q, u)[0] / draws
    return float((mean - (q - p)).norm() / (q - p).norm())


def encode_rate(chunk: Chunk, text: str, table: IdTable | None) -> tuple[float, float]:
    """Tokens/s of logits to bytes, and of torch.topk(64) of the same logits just before."""
    spec = parse_targets(text)
    u = torch.rand(len(chunk.logits), dtype=torch.float64, device=chunk.logits.device)
    table = table.to(chunk.logits.device) if table else None

    def work() -> None:
        targets = select(chunk.logits, spec, uniforms=u, realized_ids=chunk.realized)
        encode(targets, bits=code_bits(text), id_table=table)

    topk = rate(lambda: chunk.logits.topk(64), len(chunk.logits))
    return rate(work, len(chunk.logits)), topk


def rate(work: Callable[[], object], num_tokens: int, repeats: int = 5) -> float:
    """Tokens/s, from the median of a few runs: of CPU time, or of the clock where there is a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    times = []
    for _ in range(repeats + 1):
        started = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock() - started)
    return num_tokens / sorted(times[1:])[repeats // 2]


def id_bits(
    targets: SparseTargets, table: IdTable | None, inclusions: Tensor
) -> tuple[float, float]:
    """Bits per id as written, and by the ids' average frequencies alone."""
    num_rows, num_ids = targets.num_rows, len(targets.token_ids)
    if table is None:
        table = IdTable.identity(targets.vocab_size, num_rows, num_ids)
    coded = code_ids(table, targets.entry_rows(), targets.token_ids, num_rows)
    written = (coded.num_cells + num_ids + int(coded.widths.sum())) / num_ids
    chance = (inclusions * (num_ids / num_rows / inclusions.sum())).clamp(1e-12, 1 - 1e-9)
    odds = chance.log() - (-chance).log1p()
    floor = -float(odds[targets.token_ids].sum() + num_rows * (-chance).log1p().sum())
    return written, floor / num_ids / math.log(2)


if __name__ == "__main__":
    main()
