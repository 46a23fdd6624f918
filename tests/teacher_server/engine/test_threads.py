"""Who has a pool of OpenMP threads: only who asks for one, and only for as long as it computes."""

import threading

import pytest
import torch

from logit_codec import encode, parse_targets, select_rows
from teacher_server.engine.device import Device
from teacher_server.engine.threads import compute_alone, compute_apart


def test_who_computes_alone_changes_no_other_thread() -> None:
    before = torch.get_num_threads()

    def alone() -> int:
        compute_alone()
        return torch.get_num_threads()

    assert compute_apart(alone, name="alone") == 1
    assert compute_apart(torch.get_num_threads, name="later") == torch.get_num_threads() == before


def test_the_device_gives_its_threads_to_who_launches() -> None:
    device = Device(torch.device("cpu"))

    def shared() -> list[int]:
        device.spare_cores()
        counts = [torch.get_num_threads()]
        device.use_cores()
        return [*counts, torch.get_num_threads()]

    assert compute_apart(shared, name="both") == [1, torch.get_num_threads()]


def test_what_runs_apart_raises_here_and_may_be_left_alone() -> None:
    with pytest.raises(ValueError, match="wrong"):
        compute_apart(lambda: (_ for _ in ()).throw(ValueError("wrong")), name="wrong")
    go = threading.Event()
    with pytest.raises(TimeoutError):
        compute_apart(go.wait, name="slow", limit_s=0.01)
    go.set()


@pytest.mark.parametrize(
    "text", ["sampled:16", "top_k:64", "top_k:min_p=1/64,max_k=32", "dense:f32"]
)
def test_an_answer_has_the_same_bytes_whoever_encodes_it(text: str) -> None:
    spec = parse_targets(text)
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(600, 1000, generator=generator)
    draws = torch.rand(600, dtype=torch.float64, generator=generator)
    selected = select_rows(
        logits,
        spec,
        uniforms=draws if spec.needs_uniforms else None,
        realized_ids=torch.arange(600),
    )

    def alone() -> bytes:
        compute_alone()
        return encode(selected.compact())

    assert compute_apart(alone, name="alone") == encode(selected.compact())
