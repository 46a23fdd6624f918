"""select_rows never waits for the device, mixes no devices, compiles whole, and needs little memory."""

import pytest
import torch
from torch import Tensor

from logit_codec import (
    GivenIds,
    Selection,
    Targets,
    TargetSpec,
    decode,
    encode,
    parse_targets,
    select,
    select_rows,
)
from tests.support.fake_cuda import FakeCuda
from tests.support.live_memory import LiveMemory
from tests.support.waits import Waits

SPECS = (
    "sampled:16,entropy=1,log_z=1",
    "sampled:64",
    "top_k:1",
    "top_k:64,entropy=1",
    "top_k:min_p=1/256,max_k=128",
    "top_k:min_p=1e-9,max_k=40",
    "top_k:top_p=0.95,max_k=128",
    "dense:f32,entropy=1",
    "dense:bf16",
    "given_ids:entropy=1",
    "given_ids:bits=32,ranks=1",
    "realized",
    "hidden:int8,entropy=1",
    "hidden:bf16,realized=0",
    "features:layers=8+16,log_z=1",
)
NUM_GIVEN, HIDDEN_SIZE = 16, 96


def spec_of(text: str) -> TargetSpec:
    """As a service completes it."""
    return parse_targets(text).for_rows(NUM_GIVEN).for_head("ab" * 16, HIDDEN_SIZE)


def arguments(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(num_rows)
    given = torch.randint(-1, vocab_size, (num_rows, NUM_GIVEN), generator=generator)
    given[:, 0].clamp_(min=0)
    states = torch.randn(num_rows, 3, HIDDEN_SIZE, generator=generator).to(dtype)
    return {
        "logits": (torch.randn(num_rows, vocab_size, generator=generator) * 4).to(dtype),
        "uniforms": torch.rand(num_rows, generator=generator, dtype=torch.float64),
        "realized_ids": torch.randint(vocab_size, (num_rows,), generator=generator),
        "given_ids": GivenIds.of(given).padded(),
        "hidden": states[:, 0],
        "features": states[:, 1:],
    }


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(50, torch.float32), (1001, torch.bfloat16), (70_000, torch.bfloat16)]
)
@pytest.mark.parametrize("text", SPECS)
def test_on_an_accelerator_nothing_waits_and_no_devices_are_mixed(text, dtype, vocab_size):
    text = text.replace(":64", ":16") if vocab_size == 50 else text
    asked = arguments(40, vocab_size, dtype)
    real = select_rows(spec=spec_of(text), temperature=0.7, **asked)
    with FakeCuda() as cuda:
        asked = {name: value.to(cuda.device) for name, value in asked.items()}
        with Waits() as waits:
            fake = select_rows(spec=spec_of(text), temperature=0.7, **asked)
            ring = fake.empty_like(100, pin_memory=True)
            fake.copy_to(ring, 60)
            joined = Selection.cat([fake, fake[:3]])
        assert waits.found == []
        for name, column in real.columns.items():
            assert fake.columns[name].device == cuda.device
            assert fake.columns[name].shape == column.shape
            assert fake.columns[name].dtype == column.dtype
            assert ring.columns[name].device.type == "cpu"
            assert ring.columns[name].is_pinned()
        assert len(joined) == 43


@pytest.mark.parametrize("text", SPECS)
def test_one_compiled_graph_selects_the_same_ids(text):
    torch._dynamo.reset()
    asked = arguments(12, 1001, torch.bfloat16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    spec = spec_of(text)

    def columns(**asked) -> dict[str, Tensor]:
        return select_rows(spec=spec, temperature=0.7, **asked).columns

    eager = columns(**asked)
    compiled = torch.compile(columns, fullgraph=True, dynamic=False, backend=backend)(**asked)
    assert len(graphs) == 1
    assert list(compiled) == list(eager)
    for name, column in eager.items():
        if column.dtype == torch.int32:
            assert torch.equal(compiled[name], column)
        else:
            torch.testing.assert_close(compiled[name], column)


@pytest.mark.parametrize("text", [*SPECS, "top_k:1024,entropy=1", "sampled:1024,entropy=1"])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(128, 32_003), (128, 262_144)])
def test_memory_beside_the_result_is_at_most_a_quarter_of_the_logits(text, num_rows, vocab_size):
    asked = arguments(num_rows, vocab_size, torch.bfloat16)
    with LiveMemory(*asked.values()) as memory:
        rows = select_rows(spec=spec_of(text), **asked)
    assert memory.peak - rows.nbytes <= num_rows * vocab_size * 4 / 4


def test_a_chunk_of_an_accelerator_needs_as_little_memory():
    for text in (*SPECS[1:6], *SPECS[8:]):
        with FakeCuda() as cuda, cuda.device:
            asked = {
                "logits": torch.empty(512, 128_256, dtype=torch.bfloat16),
                "uniforms": torch.empty(512, dtype=torch.float64),
                "realized_ids": torch.empty(512, dtype=torch.int64),
                "given_ids": torch.empty(512, NUM_GIVEN, dtype=torch.int64),
                "hidden": torch.empty(512, 4096, dtype=torch.bfloat16),
                "features": torch.empty(512, 2, 4096, dtype=torch.bfloat16),
            }
            with LiveMemory(*asked.values()) as memory:
                rows = select_rows(spec=spec_of(text), **asked)
            assert memory.peak - rows.nbytes <= 512 * 128_256 * 4 / 4, text


def same_targets(one: Targets, other: Targets) -> None:
    assert type(one) is type(other)
    for name, value in one._tensors().items():
        assert torch.equal(value, other._tensors()[name]), name


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bytes_whatever_chunk_it_is_in(text, dtype):
    """In chunks of 1, 7, 50 and 150 rows, of which the last takes several pieces."""
    asked = arguments(150, 5000, dtype)
    spec = spec_of(text)
    whole = select_rows(spec=spec, **asked)
    for size in (1, 7, 50):
        parts = [
            select_rows(spec=spec, **{name: value[i : i + size] for name, value in asked.items()})
            for i in range(0, 150, size)
        ]
        joined = Selection.cat(parts)
        for name, column in whole.columns.items():
            assert torch.equal(joined.columns[name], column), (size, name)


@pytest.mark.parametrize("text", SPECS)
def test_rows_survive_slicing_joining_and_a_ring_of_buffers(text):
    asked = arguments(30, 1001)
    rows = select_rows(spec=spec_of(text), **asked)
    targets = select(spec=spec_of(text), **asked)
    assert len(rows) == 30
    same_targets(rows.compact(), targets)
    same_targets(rows[5:20].compact(), targets[5:20])
    same_targets(rows.to("cpu", non_blocking=True).compact(), targets)
    same_targets(Selection.cat([rows[:11], rows[11:12], rows[12:]]).compact(), targets)
    ring = rows.empty_like(100)
    assert len(ring) == 100
    assert ring.nbytes == rows[:1].nbytes * 100
    rows[10:30].copy_to(ring, 70)
    same_targets(ring[70:90].compact(), targets[10:30])
    given = getattr(targets, "given", None)
    decoded = decode(encode(targets), given_ids=given)
    same_targets(decode(encode(rows.compact()), given_ids=given), decoded)


def test_selections_of_different_things_are_not_joined():
    rows = select_rows(spec="top_k:5", **arguments(3, 100))
    others = {
        "spec": select_rows(spec="top_k:6", **arguments(3, 100)),
        "vocab_size": select_rows(spec="top_k:5", **arguments(3, 101)),
        "temperature": select_rows(spec="top_k:5", temperature=2.0, **arguments(3, 100)),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"cannot join selections of different {name}"):
            Selection.cat([rows, other])
    with pytest.raises(ValueError, match="at least one part"):
        Selection.cat([])
    with pytest.raises(ValueError, match="one number of rows"):
        Selection(rows.spec, 100, 1.0, {"a": torch.zeros(2), "b": torch.zeros(3)})
