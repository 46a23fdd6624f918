"""Launching: nothing waits for the device, and every layout of a pack runs the same graph.

Without a GPU, two things stand in for one: the CPU itself, where every operation that would wait is
counted, and fake tensors of a CUDA device, which have no values that anything could wait for.
"""

import functools
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from logit_codec import TargetSpec, parse_targets
from teacher_server.engine import attention
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.device import CudaDevice, Device, Event
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import _make_head, prepare
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.packing import SHORT, Packer
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.fake_cuda import DEVICE, FakeCuda
from tests.support.waits import Waits

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

ignore_flex_attention = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile",
    "ignore:`torch.jit.script_method` is deprecated",  # what torch.compile imports says it
)
VOCAB = 1001
CONTEXT = 1024
KINDS = (
    "sampled:16",
    "top_k:8",
    "top_k:8,bits=16,entropy=1,log_z=1",
    "top_k:min_p=1/64,max_k=32",
    "dense:f32",
)
LENGTHS = (300, 31, 2, 33, 129, 600)


@functools.cache
def teacher(name: str) -> TeacherModel:
    return prepare(tiny.make_model(name, VOCAB, context=CONTEXT), weights_fingerprint="")


def ask(length: int, spec: TargetSpec, temperature: float = 1.0) -> RowRequest:
    ids = torch.arange(length) * 7 % VOCAB
    draws = torch.rand(length - 1, dtype=torch.float64) if spec.needs_uniforms else None
    return RowRequest(ids, torch.arange(length - 1), spec, temperature, draws)


def batches() -> Iterator[list[RowRequest]]:
    """Yields batches of one kind each, at a temperature, and of all kinds together."""
    specs = [parse_targets(text) for text in KINDS]
    for spec in specs:
        yield [ask(length, spec) for length in LENGTHS]
        yield [ask(length, spec, temperature=2.0) for length in LENGTHS]
    yield [ask(length, spec) for length, spec in zip(LENGTHS, [*specs, specs[0]], strict=True)]
    rows = torch.tensor([0, 3, 29])
    yield [replace(ask(31, specs[1]), rows=rows), ask(64, specs[1], temperature=0.5)]


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
def test_launching_on_a_cpu_reads_nothing_that_was_computed(name: str) -> None:
    ours = Engine(teacher(name))
    for batch in batches():
        with Waits("cpu") as waits:
            ours.launch(batch)
        # Where sequences begin is known on the host before anything is launched. The operator of
        # the attention reads it too on a CPU, in its inside, which the mode does not see: there it
        # computes what on a GPU is one kernel.
        computed = [wait for wait in waits.found if "engine/packing.py" not in wait.where]
        assert computed == []


class FakeCudaDevice(CudaDevice):
    """Copies as to a GPU; there are no streams and events of fake tensors."""

    def __init__(self) -> None:
        Device.__init__(self, DEVICE)

    def queue(self) -> AbstractContextManager[object]:
        return Device.queue(self)

    def mark(self) -> Event:
        return Device.mark(self)

    def seconds_between(self, first: Event, second: Event) -> float:
        return Device.seconds_between(self, first, second)


@contextmanager
def fake_engine(name: str, **options: Any) -> Iterator[Engine]:
    """Yields an engine whose model is on a fake CUDA device."""
    # Under these modes nothing can be compiled: flex_attention runs uncompiled.
    with FakeCuda(), torch.compiler.set_stance("force_eager"):
        with torch.device(DEVICE):
            causal_lm = tiny.make_model(name, VOCAB, context=CONTEXT)
        model = replace(teacher(name), causal_lm=causal_lm, head=_make_head(causal_lm))
        yield Engine(model, device=FakeCudaDevice(), **options)


def assert_waits_for_nothing(ours: Engine, batch: list[RowRequest]) -> None:
    with Waits() as waits:
        launched = ours.launch(batch)
    assert waits.found == []
    assert len(launched.rows) == len(batch)
    for request, scored in zip(batch, launched.rows, strict=True):
        selections = [selection[rows] for selection, rows in scored.pieces]
        assert sum(map(len, selections)) == len(request.rows)
        for selection in selections:
            assert {column.device.type for column in selection.columns.values()} == {"cpu"}


# Not Mixtral: transformers asks the GPU itself which product of experts it has.
@ignore_flex_attention
@pytest.mark.parametrize("name", tiny.DENSE_ARCHITECTURES)
def test_launching_on_a_gpu_waits_for_nothing_and_mixes_no_devices(name: str) -> None:
    with fake_engine(name, pack_tokens=512) as ours:
        assert_waits_for_nothing(ours, [ask(n, parse_targets("top_k:4")) for n in (31, 2, 100)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_selected_on_a_gpu_without_waiting(kind: str) -> None:
    spec = parse_targets(kind)
    with fake_engine("Llama", pack_tokens=512) as ours:
        # In two packs, as lengths are on both sides of SHORT.
        assert_waits_for_nothing(ours, [ask(300, spec), ask(31, spec, temperature=2.0)])


def test_several_specs_share_a_pack_on_a_gpu() -> None:
    with fake_engine("Llama", pack_tokens=512) as ours:
        assert_waits_for_nothing(ours, [ask(40, parse_targets(kind)) for kind in KINDS[:4]])


@pytest.mark.parametrize("num_rows", [40, 200])
def test_chunks_of_a_gpu_have_one_size_whatever_is_asked_for(num_rows: int) -> None:
    sizes = set()
    with fake_engine("Llama", chunk_nbytes=64 * 4 * VOCAB) as ours:
        launched = ours.launch([ask(num_rows + 1, parse_targets("top_k:4"))])
        for scored in launched.rows:
            sizes |= {len(selection) for selection, _ in scored.pieces}
    assert sizes == {64}


# The attention for GPUs.


@ignore_flex_attention
@pytest.mark.parametrize("window", [attention.NO_WINDOW, 1, 32, 1000])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_softcapped_attention_of_a_gpu_is_that_of_a_cpu(window: int, num_kv_heads: int) -> None:
    torch.manual_seed(0)
    ends = torch.tensor([0, 5, 133, 134, 256, 256], dtype=torch.int32)
    query = torch.randn(1, 4, 256, 16)
    key, value = (torch.randn(1, num_kv_heads, 256, 16) for _ in range(2))
    expected = attention.attend_on_cpu(query, key, value, ends, None, window, 2.0, 0.25, None)
    with torch.compiler.set_stance("force_eager"):
        found = attention._attend_with_softcap(query, key, value, ends, window, 2.0, 0.25)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    uncapped = attention.attend_on_cpu(query, key, value, ends, None, window, 0.0, 0.25, None)
    assert window == 1 or (uncapped - expected).abs().max() > 1e-3


def test_the_layers_of_a_pack_share_its_masks() -> None:
    ends = torch.tensor([0, 5, 133, 256], dtype=torch.int32)
    mask = attention._find_mask(ends, 256, 32)
    assert attention._find_mask(ends, 256, 32) is mask
    assert attention._find_mask(ends, 256, attention.NO_WINDOW) is not mask
    assert attention._find_mask(ends.clone(), 256, 32) is not mask
    kept = len(attention._masks)
    del ends
    assert len(attention._masks) == kept - 1, "a pack that is gone leaves nothing"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@ignore_flex_attention
def test_softcapped_attention_of_a_gpu_is_compiled_once_for_each_window() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    query, key, value = (torch.randn(1, 4, 256, 16) for _ in range(3))
    for bounds in ([0, 5, 133, 134, 256, 256], [0, 100, 200, 256, 256, 256]):
        ends = torch.tensor(bounds, dtype=torch.int32)
        for window in (attention.NO_WINDOW, 32):
            expected = attention.attend_on_cpu(
                query, key, value, ends, None, window, 2.0, 0.25, None
            )
            with torch.inference_mode():
                found = attention._attend_with_softcap(query, key, value, ends, window, 2.0, 0.25)
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


# One graph.

LAYOUTS = ((5, 70, 33, 128), (100, 100), (7,) * 10, (256,), (70, 5))


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2", "Gemma3", "Mixtral", "GPT2"])
def test_a_pack_of_fixed_size_is_one_graph_in_every_layout(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = teacher(name)
    base = model.causal_lm.base_model
    compiled = torch.compile(base, fullgraph=True, dynamic=False, backend="aot_eager")
    packer = Packer("cuda", pack_tokens=SHORT)
    spec = parse_targets("top_k:4")

    def run(forward: Any, ids: Tensor, positions: Tensor, ends: Tensor) -> Tensor:
        with attention.packed_attention(model.causal_lm), torch.inference_mode():
            output = forward(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, cu_seqlens=ends
            )
        return output.last_hidden_state[0]

    for lengths in LAYOUTS:
        (pack,) = packer.pack([ask(length, spec) for length in lengths])
        place = (pack.token_ids, pack.positions, pack.cu_seqlens)
        torch.testing.assert_close(run(compiled, *place), run(base, *place), atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
