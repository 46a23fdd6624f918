"""Packs: sequences keep to themselves, and give the same bytes in any pack.

The oracle is the model's own full forward over one sequence, normalised in float64.
"""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from logit_codec import DenseSpec, DenseTargets, TargetSpec, TopKSpec, encode, parse_targets
from student_trainer import LocalTeacher
from teacher_server.engine import attention
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import prepare
from teacher_server.engine.packing import MIN_SEQUENCE_TOKENS, ROW_MULTIPLE, SHORT, Packer
from teacher_server.engine.probe import is_exact
from tests.conftest import one_torch_thread
from tests.support import tiny

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

VOCAB = 1001
CONTEXT = 2048
EDGES = (2, 127, 128, 129, 511, 512, 513, 640, 1024, 1100)
"""Lengths at which the number of tiles of a sequence changes."""
SPEC = TopKSpec(k=8, bits=16, entropy=True)
DENSE = DenseSpec(bits=32)
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def engine(
    name: str, dtype: torch.dtype = torch.float32, hidden_size: int = 64, **changes: Any
) -> Engine:
    model = tiny.make_model(name, VOCAB, hidden_size=hidden_size, context=CONTEXT, **changes)
    return Engine(prepare(model.to(dtype), weights_fingerprint=""))


def random_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def log_uniform_lengths(count: int, longest: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [round(2 * (longest / 2) ** draw.random()) for _ in range(count)]


def ask(ids: Tensor, spec: TargetSpec = SPEC, temperature: float = 1.0) -> RowRequest:
    draws = None
    if spec.needs_uniforms:
        generator = torch.Generator().manual_seed(len(ids))
        draws = torch.rand(len(ids) - 1, dtype=torch.float64, generator=generator)
    return RowRequest(ids, torch.arange(len(ids) - 1), spec, temperature, draws)


def scored_bytes(engine: Engine, requests: Sequence[RowRequest]) -> list[bytes]:
    return [encode(targets) for targets in engine.score(requests)]


# Bytes.


def count_differences(engine: Engine, lengths: Sequence[int], num_packs: int, most: int) -> int:
    """Counts answers that are other bytes in a random pack than alone.

    Each pack holds up to `most` of the sequences in any order, and sequences of other specs.
    """
    requests = [ask(random_ids(length, seed)) for seed, length in enumerate(lengths)]
    alone = [scored_bytes(engine, [request])[0] for request in requests]
    others = [
        ask(random_ids(40), parse_targets("sampled:16")),
        ask(random_ids(65), DenseSpec(bits=16)),
        ask(random_ids(10), parse_targets("top_k:min_p=1/64,max_k=32"), 2.0),
        ask(random_ids(77), SPEC, 0.5),
    ]
    draw = random.Random(len(lengths))
    different = 0
    for _ in range(num_packs):
        # Among them a number below 0 stands for a sequence of another spec.
        chosen = draw.sample(range(-len(others), len(requests)), draw.randint(2, most))
        pack = [others[index] if index < 0 else requests[index] for index in chosen]
        for index, payload in zip(chosen, scored_bytes(engine, pack), strict=True):
            different += index >= 0 and payload != alone[index]
    return different


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", tiny.DENSE_ARCHITECTURES)
def test_a_sequence_gives_the_same_bytes_in_any_pack(name: str, dtype: torch.dtype) -> None:
    lengths = [*log_uniform_lengths(4, 200, seed=1), 128, 129, 640]
    assert count_differences(engine(name, dtype), lengths, num_packs=4, most=5) == 0


# Where products really round differently by their number of rows.
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_sequence_gives_the_same_bytes_in_any_pack_of_a_wide_model(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    ours = engine("Llama", torch.bfloat16, 512, num_hidden_layers=1)
    lengths = [*log_uniform_lengths(3, 200, seed=2), 127, 513]
    assert count_differences(ours, lengths, num_packs=3, most=4) == 0


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [64, 512])
@pytest.mark.parametrize("name", tiny.DENSE_ARCHITECTURES)
def test_a_hundred_sequences_give_the_same_bytes_in_twenty_packs(
    name: str, hidden_size: int, dtype: torch.dtype, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    lengths = [*log_uniform_lengths(90, 700, seed=3), *EDGES]
    ours = engine(name, dtype, hidden_size)
    assert count_differences(ours, lengths, num_packs=20, most=12) == 0


def test_experts_give_the_same_answer_within_a_tolerance_and_are_not_called_exact() -> None:
    ours = engine("Mixtral")
    assert not is_exact(ours)
    requests = [ask(random_ids(length, length), DENSE) for length in (33, 300, 129, 2)]
    for request, targets in zip(requests, ours.score(requests), strict=True):
        (alone,) = ours.score([request])
        assert isinstance(targets, DenseTargets)
        assert isinstance(alone, DenseTargets)
        assert (targets.logprobs - alone.logprobs).abs().max() < 1e-4


# Values.


def worst_error(ours: Engine, lengths: Sequence[int]) -> float:
    """Returns the largest difference of packed log-probabilities to the model's own, in nats."""
    requests = [ask(random_ids(length, seed), DENSE) for seed, length in enumerate(lengths)]
    worst = 0.0
    for request, targets in zip(requests, ours.score(requests), strict=True):
        logits = tiny.dense_logits(ours.model.causal_lm, request.token_ids)
        assert isinstance(targets, DenseTargets)
        error = (targets.logprobs - torch.log_softmax(logits, 1)).abs().max()
        worst = max(worst, float(error))
    return worst


STRONG_SOFTCAP = {"attn_logit_softcapping": 0.5}


# Gemma 2 and 3 and GptOss have windows of 32 tokens, Gemma 2 a softcap, GptOss sinks.
@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, "GptOss"])
def test_the_targets_of_a_pack_are_those_of_each_sequences_own_forward(name: str) -> None:
    ours = engine(name, **STRONG_SOFTCAP) if name == "Gemma2" else engine(name)
    assert ours.model.is_packed
    assert worst_error(ours, (300, 31, 2, 33, 129, 600)) < 2e-5


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("Gemma2", STRONG_SOFTCAP),
        ("Gemma2", {"sliding_window": CONTEXT}),
        ("Gemma3", {"sliding_window": CONTEXT}),
        ("GptOss", {"sliding_window": CONTEXT}),
    ],
)
def test_softcaps_and_windows_matter_in_these_models(name: str, other: dict[str, Any]) -> None:
    # Else the test above would show nothing of them.
    ids = random_ids(300)
    both = [
        tiny.dense_logits(tiny.make_model(name, VOCAB, context=CONTEXT, **changes), ids)
        for changes in ({}, other)
    ]
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_a_sequence_longer_than_a_pack_runs_on_a_cpu() -> None:
    model = engine("Gemma2").model
    ours = Engine(model, pack_tokens=256)
    assert worst_error(ours, (300, 31, 600)) < 2e-5
    lengths = (300, 31, 129, 600, 250, 2)
    assert count_differences(ours, lengths, num_packs=4, most=6) == 0
    requests = [ask(random_ids(length, seed)) for seed, length in enumerate(lengths)]
    assert scored_bytes(ours, requests) == scored_bytes(engine("Gemma2"), requests)


# RoPE that depends on the longest sequence.


def longrope_engine() -> Engine:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.5 + i for i in range(8)],
        "original_max_position_embeddings": 64,
        "factor": 32.0,
    }
    return engine_of("Llama", rope)


def engine_of(name: str, rope: dict[str, Any]) -> Engine:
    model = tiny.make_model(name, VOCAB, context=CONTEXT, rope_parameters=rope)
    return Engine(prepare(model, weights_fingerprint=""))


def test_longrope_never_mixes_both_sides_of_its_limit() -> None:
    ours = longrope_engine()
    assert ours.model.is_packed
    lengths = (40, 65, 64, 300, 2, 129)
    requests = [ask(random_ids(length)) for length in lengths]
    for packer in (ours.packer, Packer("cuda", pack_tokens=512, divide_at=64)):
        packs = packer.pack(requests)
        sides = [{lengths[member] > 64 for member in pack.members} for pack in packs]
        assert all(len(side) == 1 for side in sides)
        for pack, (is_long,) in zip(packs, sides, strict=True):  # the frequencies are chosen by it
            assert (int(pack.positions.max()) >= 64) == is_long
    assert worst_error(ours, lengths) < 2e-5
    assert count_differences(ours, lengths, num_packs=4, most=6) == 0


def test_what_dynamic_rope_answers_does_not_depend_on_what_came_before() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    ours = engine_of("Llama", rope)
    assert ours.model.max_sequence_tokens == CONTEXT  # longer ones are refused
    short, longest = ask(random_ids(40)), ask(random_ids(CONTEXT))
    before = scored_bytes(ours, [short])
    assert scored_bytes(ours, [longest, short])[1:] == before
    assert scored_bytes(ours, [short]) == before


# Layout.


def lay_out(lengths: Sequence[int], packer: Packer) -> list[list[int]]:
    """Checks each pack, and returns the lengths of the sequences in each."""
    sequences = [torch.full((length,), number + 1) for number, length in enumerate(lengths)]
    packs = packer.pack([ask(ids) for ids in sequences])
    found = []
    for pack in packs:
        ends = pack.cu_seqlens.tolist()
        assert pack.token_ids.dtype == pack.positions.dtype == torch.int64
        assert pack.cu_seqlens.dtype == torch.int32
        assert len(pack.token_ids) == len(pack.positions)
        assert ends == sorted(ends)
        assert ends[0] == 0
        assert pack.num_tokens == sum(lengths[member] for member in pack.members)
        for number, (member, start) in enumerate(zip(pack.members, pack.starts, strict=True)):
            stop = start + lengths[member]
            assert (ends[number], ends[number + 1]) == (start, stop)
            assert torch.equal(pack.token_ids[start:stop], sequences[member])
            assert torch.equal(pack.positions[start:stop], torch.arange(stop - start))
        # Positions of padding would otherwise exceed a context, or choose the frequencies of RoPE.
        assert not pack.token_ids[pack.num_tokens :].any()
        assert not pack.positions[pack.num_tokens :].any()
        found.append([lengths[member] for member in pack.members])
    members = [member for pack in packs for member in pack.members]
    assert sorted(members) == list(range(len(lengths)))
    return found


@pytest.mark.parametrize("lengths", [(2,), (128,), (5, 123), (100, 100, 700), (129, 2, 64)])
def test_a_pack_on_a_cpu_is_filled_up_to_whole_tiles(lengths: tuple[int, ...]) -> None:
    packer = Packer("cpu", pack_tokens=1024)
    assert packer.shapes == []
    assert lay_out(lengths, packer) == [list(lengths)]
    (pack,) = packer.pack([ask(random_ids(length)) for length in lengths])
    assert len(pack.token_ids) == -(-sum(lengths) // ROW_MULTIPLE) * ROW_MULTIPLE
    assert pack.tiling is not None


def test_packs_are_filled_in_order_and_only_a_long_sequence_exceeds_one() -> None:
    packer = Packer("cpu", pack_tokens=256)
    assert lay_out((200, 56, 2, 300, 10), packer) == [[200, 56], [2], [300], [10]]


def test_packs_on_a_gpu_have_two_shapes_and_the_length_alone_chooses() -> None:
    packer = Packer("cuda", pack_tokens=1024)
    assert packer.shapes == [SHORT, 1024]
    lengths = (SHORT, 300, 2, 1024, SHORT + 1, 3, 254, 700)
    found = lay_out(lengths, packer)
    for some in found:
        assert len({length <= SHORT for length in some}) == 1
    packs = packer.pack([ask(random_ids(length)) for length in lengths])
    for size, most in ((SHORT, SHORT // MIN_SEQUENCE_TOKENS), (1024, 1024 // SHORT)):
        same = [pack for pack in packs if len(pack.token_ids) == size]
        # A segment more for padding, and a bound more than there are segments.
        assert {len(pack.cu_seqlens) for pack in same} == {most + 2}
        assert all(int(pack.cu_seqlens[-1]) == size for pack in same)
    assert {len(pack.token_ids) for pack in packs} == {SHORT, 1024}
    assert all(pack.tiling is None for pack in packs)


@pytest.mark.parametrize("pack_tokens", [64, SHORT, 300, 1024])
def test_as_many_of_the_shortest_sequences_as_fit_have_segments_enough(pack_tokens: int) -> None:
    packer = Packer("cuda", pack_tokens=pack_tokens)
    short = min(SHORT, pack_tokens)
    lengths = [2] * (short // 2) + [SHORT + 1] * (4 if pack_tokens > SHORT else 0)
    lay_out(lengths, packer)
    packs = packer.pack([ask(random_ids(length)) for length in lengths])
    assert short in [pack.num_tokens for pack in packs]  # full


def test_an_underfull_pack_shrinks_at_level_tolerance() -> None:
    packer = Packer("cuda", pack_tokens=2048, exact=False)
    sizes = {}
    for length in (2, 257, 512, 513, 1100, 2048):
        (pack,) = packer.pack([ask(random_ids(length))])
        sizes[length] = len(pack.token_ids)
    assert sizes == {2: 256, 257: 512, 512: 512, 513: 1024, 1100: 2048, 2048: 2048}
    assert set(sizes.values()) == set(packer.shapes)  # which are warmed up


def test_a_short_context_is_no_obstacle_to_packs() -> None:
    # GPT-2 has a table of positions: padding must not look beyond its end.
    model = prepare(tiny.make_model("GPT2", VOCAB, context=40), weights_fingerprint="")
    assert model.is_packed
    assert worst_error(Engine(model), (2, 40, 33)) < 2e-5


# Architectures that cannot pack.


class Untold(transformers.LlamaForCausalLM):
    """Its attention gets no keyword arguments."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.forward = without_keywords(layer.self_attn.forward)


def without_keywords(forward: Callable[..., Any]) -> Callable[..., Any]:
    known = ("hidden_states", "position_embeddings", "attention_mask")

    def plain(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{name: kwargs[name] for name in known if name in kwargs})

    return plain


class Mixing(transformers.LlamaForCausalLM):
    """Shifts each token's embedding by the one before: a convolution, which knows no segments."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].register_forward_pre_hook(
            lambda _, args: (
                args[0] + args[0].roll(1, 1) * (torch.arange(args[0].shape[1]) > 0)[:, None],
                *args[1:],
            )
        )


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Untold, "does not pass keyword arguments on"), (Mixing, "does not keep the sequences")],
)
def test_no_dtype_hides_that_an_architecture_cannot_pack(
    kind: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    causal_lm = kind(tiny.make_model("Llama", VOCAB, context=CONTEXT).config)
    assert not prepare(causal_lm.to(torch.bfloat16), weights_fingerprint="").is_packed
    assert why in caplog.text


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Untold, "does not pass keyword arguments on"), (Mixing, "does not keep the sequences")],
)
def test_an_architecture_that_cannot_pack_runs_canonical_lengths(
    kind: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    causal_lm = kind(tiny.make_model("Llama", VOCAB, context=CONTEXT).config)
    model = prepare(causal_lm, weights_fingerprint="")
    assert not model.is_packed
    assert model.attention == model.own_attention == "sdpa"
    assert why in caplog.text
    ours = Engine(model)
    lengths = (300, 31, 2, 33, 300, 129, 600)
    assert worst_error(ours, lengths) < 2e-5
    assert is_exact(ours)
    assert count_differences(ours, lengths, num_packs=4, most=6) == 0


def test_a_model_that_is_told_not_to_pack_gives_the_same_answer() -> None:
    packed = engine("Gemma2")
    model = prepare(packed.model.causal_lm, weights_fingerprint="", packed=False)
    assert not model.is_packed
    own = Engine(model)
    assert own.model.teacher_fingerprint != packed.model.teacher_fingerprint
    assert worst_error(own, (300, 31, 2, 33, 129, 600)) < 2e-5


# The model of a caller.


class Failing(Exception):
    """Raised by a layer, in the middle of a forward pass."""


def test_the_model_of_a_caller_keeps_its_own_attention() -> None:
    model = tiny.make_model("Llama", VOCAB, context=CONTEXT, attn_implementation="eager")
    ids = random_ids(300)
    expected = tiny.dense_logits(model, ids)
    teacher = LocalTeacher(model)

    def is_untouched() -> bool:
        own = model.config._attn_implementation
        return own == "eager" and torch.equal(tiny.dense_logits(model, ids), expected)

    assert is_untouched()
    list(teacher.stream([ids], targets="top_k:4"))
    assert is_untouched()

    seen = []

    def fail(*_: Any) -> None:
        seen.append(model.config._attn_implementation)
        raise Failing

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(Failing):
        list(teacher.stream([ids], targets="top_k:4"))
    hook.remove()
    assert seen == [attention.NAME]
    assert is_untouched()
    list(teacher.stream([ids], targets="top_k:4"))
    assert is_untouched()
