"""Weights on disk: hashed while they are loaded, in one pass, and shown."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from logitstream.files import cache_folder
from teacher_server.engine import progress, weight_files
from teacher_server.engine.loading import load
from teacher_server.engine.progress import Progress
from teacher_server.engine.weight_files import read_weights, tensor_sizes
from teacher_server.errors import ModelError
from tests.conftest import one_torch_thread
from tests.support import tiny

VOCAB = 1003

one_thread = pytest.fixture(autouse=True, scope="module")(one_torch_thread)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A tiny Llama in several files."""
    folder = tmp_path / "shards"
    tiny.make_model("Llama", VOCAB).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def kept_hashes() -> dict[str, str]:
    path = cache_folder() / "weights.json"
    return json.loads(path.read_text()) if path.exists() else {}


def in_hub_cache(folder: Path, cache: Path) -> Path:
    """Lays a folder out as the hub library does: links into a folder of blobs named by content."""
    snapshot, blobs = cache / "snapshots" / ("a" * 40), cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        # Of small files it is the SHA-1 of git, of large ones the SHA-256.
        kind = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / kind(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_the_fingerprint_is_of_name_size_and_content_of_all_files(shards: Path) -> None:
    digest = hashlib.sha256(b"")
    for path in sorted(shards.glob("*.safetensors")):
        content = path.read_bytes()
        sha = hashlib.sha256(content).hexdigest()
        digest.update(f"{path.name}:{len(content)}:{sha}\n".encode())
    assert load(str(shards)).weights_fingerprint == digest.hexdigest()


def test_the_names_of_the_hubs_files_are_their_hashes(shards: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(shards, tmp_path / "hub")
    assert load(str(snapshot)).weights_fingerprint == load(str(shards)).weights_fingerprint
    # Only the other folder's files were read for it.
    assert len(kept_hashes()) == len(list(shards.glob("*.safetensors")))
    assert not any("blobs" in identity for identity in kept_hashes())


def test_a_link_to_anywhere_else_is_hashed(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (tmp_path / "blobs").mkdir()
    for path in shards.iterdir():
        name = "f" * 64 if path.name.endswith("00001.safetensors") else path.name
        (tmp_path / "blobs" / name).write_bytes(path.read_bytes())
        (folder / path.name).symlink_to(tmp_path / "blobs" / name)
    assert load(str(folder)).weights_fingerprint == load(str(shards)).weights_fingerprint


def test_what_cannot_be_loaded_is_not_hashed_to_the_end(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "READ_NBYTES", 1)
    with pytest.raises(ModelError, match="stopped"), read_weights(shards, "") as hashes:
        raise ModelError("stopped")
    nbytes = sum(path.stat().st_size for path in shards.glob("*.safetensors"))
    assert sum(hashes._counted) < nbytes
    assert not kept_hashes()


def test_sizes_are_those_of_the_tensors(shards: Path) -> None:
    paths = sorted(shards.glob("*.safetensors"))
    sizes = tensor_sizes(paths)
    for path in paths:
        for name, tensor in load_file(path).items():
            assert sizes.pop(name) == tensor.nbytes
    assert not sizes


def test_progress_counts_every_byte(shards: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with caplog.at_level(logging.INFO):
        load(str(shards))
    lines = [r for r in caplog.records if r.getMessage().startswith("loading weights")]
    assert len(lines) >= len(list(shards.glob("*.safetensors")))
    done = [record.args[1] for record in lines]  # type: ignore[index]
    assert done == sorted(done)
    sizes = tensor_sizes(sorted(shards.glob("*.safetensors")))
    assert done[-1] * (1 << 30) == pytest.approx(sum(sizes.values()))
    assert "weights loaded gib=0.00" in caplog.text


def test_progress_counts_experts_that_are_put_together(tmp_path: Path, caplog, monkeypatch) -> None:
    tiny.make_model("Mixtral", VOCAB).save_pretrained(tmp_path / "mixtral")
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with caplog.at_level(logging.INFO):
        load(str(tmp_path / "mixtral"))
    lines = [r for r in caplog.records if r.getMessage().startswith("loading weights")]
    sizes = tensor_sizes([tmp_path / "mixtral" / "model.safetensors"])
    assert lines[-1].args[1] * (1 << 30) == pytest.approx(sum(sizes.values()))  # type: ignore


def test_a_terminal_shows_a_bar_and_a_file_lines(capsys, caplog, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO), Progress("loading", 4 << 30) as shown:
        shown.add(1 << 30)
    bar = capsys.readouterr().err
    assert "loading weights:" in bar
    assert "4.00G" in bar
    assert not caplog.records


def test_bytes_on_disk_are_read_once(tmp_path: Path) -> None:
    """Weights that are not in the page cache: what the disk delivers, while one loads and hashes."""
    weights = {f"w{i}": torch.randn(1 << 20) for i in range(16)}
    for number, (name, weight) in enumerate(weights.items()):
        save_file({name: weight}, tmp_path / f"{number}.safetensors")
    nbytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    for path in tmp_path.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = bytes_from_disk()
    with read_weights(tmp_path, "") as hashes:
        read = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
        assert sum(float(w.sum()) != 0 for file in read for w in file.values()) == 16
        assert hashes.fingerprint()
    delivered = bytes_from_disk() - before
    if delivered < nbytes / 2:
        pytest.skip("this file system keeps its files in memory or counts no reads")
    assert delivered < 1.1 * nbytes


def bytes_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


MEASURE = """
import sys
from pathlib import Path
from teacher_server.engine.loading import load

def peak(name="VmHWM"):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
before = peak()
model = load(sys.argv[1], device="cpu", **({"load_format": "dummy"} if sys.argv[2:] else {}))
weights = {p.data_ptr(): p.nbytes for p in model.causal_lm.parameters()}
print((peak() - before) / sum(weights.values()), sum(weights.values()), model.is_packed)
"""


def measure_peak(folder: Path, *arguments: str) -> float:
    """Returns the memory that loading takes at its peak, as a multiple of the weights."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    print(done.stdout)
    return float(done.stdout.split()[0])


def save_shape(folder: Path, *, hidden_size: int, num_layers: int) -> None:
    """A Llama of random weights in bf16, in shards."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    config.save_pretrained(folder / "config")
    model = load(str(folder / "config"), load_format="dummy", device="cpu").causal_lm
    model.save_pretrained(folder / "saved", max_shard_size="300MB")


def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    save_shape(tmp_path, hidden_size=1024, num_layers=2)  # 0.2 GB
    assert measure_peak(tmp_path / "saved") < 1.5


@pytest.mark.slow
def test_a_billion_parameters_take_a_fifth_more_memory_than_the_weights(tmp_path: Path) -> None:
    save_shape(tmp_path, hidden_size=2048, num_layers=16)  # 2.4 GB
    assert measure_peak(tmp_path / "saved") <= 1.2
    assert measure_peak(tmp_path / "config", "dummy") <= 1.2
