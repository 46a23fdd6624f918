"""The head against the oracle: the model's own full forward, normalised in float64."""

import ctypes
import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from logit_codec import (
    DenseSpec,
    DenseTargets,
    Selection,
    Targets,
    TargetSpec,
    TopKSpec,
    TopKTargets,
    decode,
    encode_parts,
    parse_targets,
)
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.device import Device
from teacher_server.engine.engine import Engine
from teacher_server.engine.head import MAX_CHUNK_ROWS, MIN_TILE, States, VocabularyHead
from teacher_server.engine.loading import prepare
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.probe import is_exact
from tests.conftest import one_torch_thread
from tests.support import tiny

one_thread = pytest.fixture(autouse=True)(one_torch_thread)
TOP_64 = TopKSpec(k=64, bits=16, entropy=True)
DENSE = DenseSpec(bits=32)
CPU = torch.device("cpu")
BYTE_EXACT = [(name, 1001) for name in tiny.DENSE_ARCHITECTURES] + [("Gemma2", 1000)]


@functools.cache
def teacher(name: str, vocab_size: int) -> TeacherModel:
    return prepare(tiny.make_model(name, vocab_size))


@functools.cache
def engine(name: str, vocab_size: int) -> Engine:
    return Engine(teacher(name, vocab_size))


def every_row(ids: Tensor, spec: TargetSpec, temperature: float = 1.0) -> RowRequest:
    return RowRequest(ids, torch.arange(len(ids) - 1), spec, temperature)


def sequences_of_one_bucket(vocab_size: int) -> list[Tensor]:
    """Six sequences of 33 to 64 ids; both ends are among them."""
    generator = torch.Generator().manual_seed(7)
    lengths = (64, 33, 40, 64, 47, 36)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


def encoded(targets: Targets, spec: TargetSpec) -> list[bytes]:
    return [payload for _, _, payload in encode_parts(targets, spec, max_nbytes=1 << 20)]


def scored_bytes(engine: Engine, batch: Sequence[RowRequest]) -> list[list[bytes]]:
    results = engine.score(batch)
    return [encoded(kept, item.spec) for kept, item in zip(results, batch, strict=True)]


def decoded(targets: Targets, spec: TargetSpec) -> Targets:
    return Targets.cat([decode(payload) for payload in encoded(targets, spec)])


def assert_top_k_is_the_oracle(
    targets: Targets, logits_RV: Tensor, realized_R: Tensor, k: int, temperature: float
) -> None:
    assert isinstance(targets, TopKTargets)
    logprobs_RV = torch.log_softmax(logits_RV / temperature, 1)
    ordered = logits_RV.sort(dim=1, descending=True, stable=True)  # equal logits: lowest id first
    expected_RK = ordered.indices[:, :k].sort(dim=1).values
    got_RK = targets.token_ids.view(-1, k)
    # Two logits closer than the rounding of float32 may change places around the k-th.
    for row in (got_RK != expected_RK).any(1).nonzero()[:, 0].tolist():
        swapped = set(got_RK[row].tolist()) ^ set(expected_RK[row].tolist())
        kth = ordered.values[row, k - 1]
        assert all(abs(logits_RV[row, i] - kth) < 1e-5 for i in swapped)
    probabilities_RK = logprobs_RV.gather(1, got_RK).exp()
    assert (targets.logprobs.view(-1, k) - probabilities_RK.log()).abs().max() < 1e-3
    tail_R = 1 - probabilities_RK.sum(1)
    assert targets.tail_logprob is not None
    assert (targets.tail_logprob.double().exp() - tail_R).abs().max() < 1e-6
    assert_extras_are_the_oracle(targets, logits_RV, realized_R, temperature)


def assert_extras_are_the_oracle(
    targets: Targets, logits_RV: Tensor, realized_R: Tensor, temperature: float
) -> None:
    logprobs_RV = torch.log_softmax(logits_RV / temperature, 1)
    assert targets.temperature == temperature
    assert targets.realized_logprob is not None
    realized = logprobs_RV.gather(1, realized_R[:, None])[:, 0]
    assert (targets.realized_logprob - realized).abs().max() < 1e-3
    if targets.log_z is not None:
        assert (targets.log_z - (logits_RV / temperature).logsumexp(1)).abs().max() < 1e-4
    if targets.entropy is not None:
        entropy = torch.special.entr(logprobs_RV.exp()).sum(1)
        assert (targets.entropy - entropy).abs().max() < 1e-3


# Values.


SOME = ("Gemma2", "Qwen3")


@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [
        # An architecture matters, and a vocabulary: of both together, two stand for all.
        pytest.param(name, size, marks=[] if size == 1001 or name in SOME else pytest.mark.slow)
        for name in tiny.ARCHITECTURES
        for size in (1000, 1001, 32003)
    ],
)
def test_targets_are_those_of_the_full_forward_in_float64(name: str, vocab_size: int) -> None:
    model = teacher(name, vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    for length in (2, 20) if vocab_size > 2000 else (2, 120):
        ids = torch.randint(vocab_size, (length,), generator=generator)
        logits = tiny.dense_logits(model.causal_lm, ids)
        for temperature in (1.0, 2.0):
            batch = [every_row(ids, TOP_64, temperature), every_row(ids, DENSE, temperature)]
            top_k, dense = engine(name, vocab_size).score(batch)
            top_k = decoded(top_k, TOP_64)
            assert_top_k_is_the_oracle(top_k, logits, ids[1:], 64, temperature)
            dense = decoded(dense, DENSE)
            assert isinstance(dense, DenseTargets)
            oracle = torch.log_softmax(logits / temperature, 1)
            assert (dense.logprobs - oracle).abs().max() < 1e-5
            assert_extras_are_the_oracle(dense, logits, ids[1:], temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab_size", [1001, 32003])
def test_equal_logits_go_to_the_lowest_id(vocab_size: int, temperature: float) -> None:
    causal_lm = tiny.make_model("Gemma2", vocab_size)
    lively = torch.cat([torch.arange(20), torch.arange(vocab_size - 20, vocab_size)])
    with torch.no_grad():  # every other row of the head is zero, and so is its logit
        weight = causal_lm.get_output_embeddings().weight
        kept = weight[lively].clone()
        weight.zero_()
        weight[lively] = kept
    ids = lively[torch.arange(40) % len(lively)]
    (targets,) = Engine(prepare(causal_lm)).score([every_row(ids, TOP_64, temperature)])
    logits = tiny.dense_logits(causal_lm, ids)
    assert (logits == 0).sum(1).min() > 64
    expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :64].sort(dim=1).values
    assert isinstance(targets, TopKTargets)
    assert (targets.token_ids.view(-1, 64) == expected).all()


@pytest.mark.parametrize(
    ("temperature", "min_p", "max_k"),
    # The first has rows without any such id, the others rows with more than max_k of them.
    [(0.5, 1 / 64, 128), (0.5, 1 / 256, 45), (1.0, 1 / 256, 10), (2.0, 1 / 500, 15)],
)
def test_min_p_keeps_every_id_from_the_threshold_on_up_to_max_k(
    temperature: float, min_p: float, max_k: int
) -> None:
    spec = TopKSpec(k=max_k, min_p=min_p)
    model = teacher("Gemma2", 1001)
    (ids,) = tiny.random_sequences(1, 1001, seed=1)
    logits = tiny.dense_logits(model.causal_lm, ids)
    probabilities = torch.softmax(logits / temperature, 1)
    (targets,) = engine("Gemma2", 1001).score([every_row(ids, spec, temperature)])
    assert isinstance(targets, TopKTargets)
    counts = targets.row_splits.diff().tolist()
    expected = (probabilities >= min_p).sum(1).clamp(1, max_k).tolist()
    near = ((probabilities - min_p).abs() < 1e-7).any(1).tolist()
    assert [c for c, n in zip(counts, near, strict=True) if not n] == [
        e for e, n in zip(expected, near, strict=True) if not n
    ]
    assert len(set(counts)) > 2
    for row, kept in enumerate(targets.token_ids.split(counts)):
        best = probabilities[row].topk(len(kept)).indices
        assert set(kept.tolist()) == set(best.tolist())
        tail = 1 - probabilities[row, kept].sum()
        assert targets.tail_logprob[row].exp() == pytest.approx(float(tail), abs=1e-6)


def test_only_the_wanted_rows_come_back() -> None:
    model = teacher("Qwen3", 1001)
    (ids,) = tiny.random_sequences(1, 1001, seed=5)
    rows = torch.tensor([0, 3, 4, 11, len(ids) - 2])
    logits = tiny.dense_logits(model.causal_lm, ids)
    spec = replace(TOP_64, k=8)
    some, one = engine("Qwen3", 1001).score(
        [RowRequest(ids, rows, spec), RowRequest(ids, rows[3:4], spec)]
    )
    assert (some.num_rows, one.num_rows) == (5, 1)
    assert_top_k_is_the_oracle(some, logits[rows], ids[rows + 1], 8, 1.0)
    assert_top_k_is_the_oracle(one, logits[11:12], ids[12:13], 8, 1.0)


def test_no_rows_at_all_are_an_error_that_says_so() -> None:
    (ids,) = tiny.random_sequences(1, 1001, seed=5)
    with pytest.raises(ValueError, match="at least one part"):
        Engine(teacher("Llama", 1001)).score([RowRequest(ids, torch.arange(0), DENSE)])


def test_a_row_is_the_same_whichever_other_rows_are_wanted() -> None:
    (ids,) = tiny.random_sequences(1, 1001, seed=5)
    rows = torch.tensor([0, 3, 4, 11, len(ids) - 2])
    some, whole = engine("Llama", 1001).score([RowRequest(ids, rows, DENSE), every_row(ids, DENSE)])
    assert isinstance(some, DenseTargets)
    assert isinstance(whole, DenseTargets)
    assert torch.equal(some.logprobs, whole.logprobs[rows])


def test_results_come_in_the_order_of_the_batch_whatever_is_grouped() -> None:
    model = teacher("GPT2", 1000)
    specs: list[tuple[TargetSpec, float]] = [(TOP_64, 1.0), (DENSE, 1.0), (TOP_64, 2.0)]
    batch = [every_row(ids, *specs[i % 3]) for i, ids in enumerate(sequences_of_one_bucket(1000))]
    results = engine("GPT2", 1000).score(batch)
    for item, targets in zip(batch, results, strict=True):
        assert targets.kind == item.spec.kind
        assert targets.temperature == item.temperature
        assert targets.num_rows == len(item.rows)
        logits = tiny.dense_logits(model.causal_lm, item.token_ids)
        assert_extras_are_the_oracle(targets, logits, item.token_ids[1:], item.temperature)


# Bytes.


@pytest.mark.parametrize(("name", "vocab_size"), BYTE_EXACT)
def test_a_sequence_gives_the_same_bytes_in_any_company(name: str, vocab_size: int) -> None:
    ours = engine(name, vocab_size)
    sequences = sequences_of_one_bucket(vocab_size)
    others = [
        every_row(ids, spec, temperature)
        for ids in sequences
        for spec, temperature in ((parse_targets("top_k:5"), 1.0), (DenseSpec(bits=16), 3.0))
    ]
    for spec, temperature in ((TOP_64, 1.0), (DENSE, 2.0)):
        items = [every_row(ids, spec, temperature) for ids in sequences]
        alone = [scored_bytes(ours, [item])[0] for item in items]
        assert scored_bytes(ours, items) == alone
        assert scored_bytes(ours, items[::-1]) == alone[::-1]
        assert scored_bytes(ours, [items[1], items[1], items[2]]) == [alone[1], alone[1], alone[2]]
        among_others = scored_bytes(ours, [*others[:5], items[3], *others[5:], items[5]])
        assert [among_others[5], among_others[-1]] == [alone[3], alone[5]]


@pytest.mark.parametrize(("name", "vocab_size"), BYTE_EXACT)
def test_wherever_chunks_begin_and_end_an_engine_gives_the_same_bytes(
    name: str, vocab_size: int
) -> None:
    model = teacher(name, vocab_size)
    nbytes = [rows * 4 * vocab_size for rows in (1, 96, 10_000)]
    engines = [Engine(model, chunk_nbytes=size) for size in nbytes]
    sizes = [VocabularyHead(model, Device(CPU), chunk_nbytes=n).chunk_rows for n in nbytes]
    assert sizes == [32, 64, 1024]
    for spec in (TOP_64, DENSE):
        items = [every_row(ids, spec) for ids in sequences_of_one_bucket(vocab_size)]
        rows = sum(len(item.rows) for item in items)
        assert rows % 32  # so the last sequence ends in a chunk that is not full
        for ours in engines:
            alone = [scored_bytes(ours, [item])[0] for item in items]
            assert scored_bytes(ours, items) == alone
            assert scored_bytes(ours, items[::-1]) == alone[::-1]


@pytest.mark.parametrize("context", [2, 5, 8, 20, 31, 97, 100])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_equal_in_contexts_that_are_no_multiple_of_32(context: int, packed: bool) -> None:
    # Few rows round differently: the longest canonical length has as many rows as the context.
    model = replace(teacher("Llama", 1001), max_sequence_tokens=context, is_packed=packed)
    ours = Engine(model)
    generator = torch.Generator().manual_seed(context)
    items = [
        every_row(torch.randint(1001, (context,), generator=generator), TOP_64) for _ in range(5)
    ]
    alone = [scored_bytes(ours, [item])[0] for item in items]
    assert scored_bytes(ours, items) == alone
    assert is_exact(ours)


def test_the_same_batch_gives_the_same_bytes_even_with_experts() -> None:
    items = [every_row(ids, TOP_64) for ids in sequences_of_one_bucket(1001)]
    ours = engine("Mixtral", 1001)
    assert scored_bytes(ours, items) == scored_bytes(ours, items)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_all_but_sparse_experts_are_exact(name: str) -> None:
    assert is_exact(engine(name, 1001)) == (name != "Mixtral")


# Memory.


@pytest.mark.parametrize("nbytes", [1, 10**6, 32 << 20, 1 << 40])
def test_chunks_are_powers_of_two_rows_within_bounds(nbytes: int) -> None:
    head = VocabularyHead(teacher("Llama", 1001), Device(CPU), chunk_nbytes=nbytes)
    rows = head.chunk_rows
    assert rows.bit_count() == 1
    assert MIN_TILE <= rows <= MAX_CHUNK_ROWS
    assert rows == MIN_TILE or rows * 4 * 1001 <= nbytes
    # So that a chunk of any size is a whole number of tiles.
    assert rows % head.large == rows % head.small == 0


BIG_VOCAB = 262_144
CHUNK_NBYTES = 128 << 20


def memory_of_selection(
    spec_text: str, temperature: float, dtype: torch.dtype, effective: int, num_rows: int
) -> tuple[float, float]:
    """Peak growth of resident memory in chunks of (C, V) logits, and the limit in the same unit."""
    torch.set_num_threads(2)
    causal_lm = tiny.make_model("Gemma2", BIG_VOCAB, num_hidden_layers=1).to(dtype)
    model = replace(
        prepare(causal_lm, weights_fingerprint="", packed=False), effective_vocab_size=effective
    )
    head = VocabularyHead(model, Device(CPU), chunk_nbytes=CHUNK_NBYTES)
    hidden = torch.randn(num_rows + 1, 64).to(dtype)
    spec = parse_targets(spec_text)

    def select(rows: int) -> list[Selection]:
        draws = torch.rand(rows, dtype=torch.float64) if spec.needs_uniforms else None
        ids = torch.zeros(rows + 1, dtype=torch.int64)
        request = RowRequest(ids, torch.arange(rows), spec, temperature, draws)
        (scored,) = head.download(head.select(States(hidden), [request], [0], [0])).values()
        return [selection for selection, _ in scored.pieces]

    select(32)  # pages of code and the threads' own buffers come once, whatever the size
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident_nbytes("VmRSS")
    selected = select(num_rows)
    growth = resident_nbytes("VmHWM") - before
    kept = sum(selection.nbytes for selection in selected) + 4 * 8 * num_rows
    assert head.chunk_rows * BIG_VOCAB * dtype.itemsize == CHUNK_NBYTES
    return growth / CHUNK_NBYTES, 1.25 + (kept + (2 << 20)) / CHUNK_NBYTES


def resident_nbytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} in /proc/self/status")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("spec", "temperature", "dtype", "effective", "num_rows"),
    [
        ("top_k:64", 1.0, torch.float32, BIG_VOCAB, 2048),
        ("top_k:64", 1.0, torch.float32, BIG_VOCAB, 32_768),
        ("top_k:64", 2.0, torch.float32, BIG_VOCAB, 256),
        ("top_k:min_p=1/256,max_k=128", 1.0, torch.float32, BIG_VOCAB, 256),
        ("sampled:64", 1.0, torch.float32, BIG_VOCAB, 256),
        # Teachers are served in bfloat16, and most heads have padding rows.
        ("top_k:64", 1.0, torch.bfloat16, BIG_VOCAB, 512),
        ("top_k:64", 1.0, torch.float32, BIG_VOCAB - 100, 256),
    ],
    ids=["top_k", "many", "temperature", "min_p", "sampled", "bfloat16", "padding"],
)
def test_the_head_needs_a_chunk_and_a_quarter_of_memory(
    spec: str, temperature: float, dtype: torch.dtype, effective: int, num_rows: int
) -> None:
    context = multiprocessing.get_context("forkserver")
    # Now and then the heap of a fresh process has a hole as large as a chunk, which then stays
    # resident; what the head itself needs is the least of a few tries.
    for _ in range(3):
        with ProcessPoolExecutor(1, mp_context=context) as pool:  # a heap that nobody has used yet
            growth, limit = pool.submit(
                memory_of_selection, spec, temperature, dtype, effective, num_rows
            ).result()
        print(f"{growth:.2f} chunks of memory, {limit:.2f} allowed")
        if growth <= limit:
            return
    raise AssertionError(f"{growth:.2f} chunks of memory, {limit:.2f} allowed")
