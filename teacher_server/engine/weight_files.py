"""Reads the safetensors of a folder: hashes them while transformers loads them, and shows how far
that is.

Hashing and loading go through the files side by side and in the same order, so that whoever comes
second finds a page in the machine's page cache: the disk is read once.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import transformers

from logitstream.files import cache_folder, write_atomically
from teacher_server.engine.progress import Progress

logger = logging.getLogger(__name__)

SHA256 = re.compile(r"[0-9a-f]{64}")
READ_NBYTES = 1 << 20
MAX_THREADS = 4
"""How many files are hashed at once."""
MAX_HEADER_NBYTES = 100 << 20
"""Of a safetensors file, as the format allows."""
LOADING = "Loading weights"
"""What transformers calls its bar."""


@contextlib.contextmanager
def read_weights(folder: Path, revision: str, *, quiet: bool = False) -> Iterator["WeightHashes"]:
    """Hashes the weights in a folder while the body loads them with transformers, and shows that.

    quiet: do neither, for one of several processes that read the same; its fingerprint is empty.
    """
    paths = [] if quiet else sorted(folder.glob("*.safetensors"))
    hashes = WeightHashes(folder, paths, revision)
    try:
        with contextlib.nullcontext() if quiet else _show_loading(paths):
            yield hashes
    finally:
        hashes.close()


class WeightHashes:
    """Hashes files in threads; `fingerprint()` waits for them, `close()` ends them.

    A file of the hub's cache is not read: its name there is its SHA-256. Other hashes are kept, by
    path, size, inode and modification time, so that a restart does not read a large teacher again.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], revision: str) -> None:
        self._revision = revision
        self._kept = _KeptHashes()
        self._stop = threading.Event()
        self._counted: list[int] = []
        """The size of each read."""
        self._known: dict[Path, str] = {}
        self._running: dict[Path, Future[str]] = {}
        workers = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)), len(paths)))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="hash")
        for path in paths:
            if found := _name_in_hub_cache(folder, path) or self._kept.find(path):
                self._known[path] = found
            else:
                self._running[path] = self._pool.submit(self._hash, path)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the revision and the name, size and content of every file.

        A file's header is part of its content. Raises OSError.
        """
        self._wait()
        hashed = {path: future.result() for path, future in self._running.items()}
        self._kept.add(hashed)
        contents = self._known | hashed
        if not contents:
            return ""
        digest = hashlib.sha256(self._revision.encode())
        for path, content in sorted(contents.items()):
            digest.update(f"{path.name}:{path.stat().st_size}:{content}\n".encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Ends hashing; does not wait for the rest of a file."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        """Waits for hashes that take longer than the loading did, and shows how far they are."""
        _, left = wait(self._running.values(), timeout=0.5)
        if not left:
            return
        shown = 0
        with Progress("hashing", sum(path.stat().st_size for path in self._running)) as progress:
            while left:
                _, left = wait(left, timeout=0.5)
                done = sum(self._counted)
                progress.add(done - shown)
                shown = done

    def _hash(self, path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_NBYTES))
        with path.open("rb", buffering=0) as file:
            while (size := file.readinto(buffer)) and not self._stop.is_set():
                digest.update(buffer[:size])
                self._counted.append(size)
        return digest.hexdigest()


@contextlib.contextmanager
def _show_loading(paths: Sequence[Path]) -> Iterator[None]:
    """Shows the progress of transformers' loading in the body, in bytes instead of tensors."""
    sizes, total = tensor_sizes(paths), sum(path.stat().st_size for path in paths)

    def replace_bar(factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") != LOADING:
            return factory(*args, **options)
        return _count(args[0], sizes, total)

    before = transformers.utils.logging.set_tqdm_hook(replace_bar)
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(before)


def _count(
    weights: Iterable[tuple[str, Any]], sizes: Mapping[str, int], total: int
) -> Iterator[tuple[str, Any]]:
    """Passes on the weights that transformers sets one by one, and counts their bytes."""
    with Progress("loading", total) as progress:
        for name, mapping in weights:
            # Asked first: what made a weight is forgotten once it is set.
            sources = {one for found in mapping.layer_targets.values() for one in found}
            yield name, mapping
            progress.add(sum(sizes.get(source, 0) for source in sources))
        logger.info("weights loaded gib=%.2f seconds=%.1f", total / (1 << 30), progress.seconds)


def tensor_sizes(paths: Sequence[Path]) -> dict[str, int]:
    """Returns the bytes of each tensor by name; what is no safetensors file is left out."""
    sizes: dict[str, int] = {}
    for path in paths:
        # What is wrong with a file is for the one to say who loads it.
        with path.open("rb") as file, contextlib.suppress(Exception):
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MAX_HEADER_NBYTES)))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                first, end = tensor["data_offsets"]
                sizes[name] = end - first
    return sizes


def _name_in_hub_cache(folder: Path, path: Path) -> str | None:
    """Returns the SHA-256 of a file that the hub library fetched: the name of what it links to."""
    if not path.is_symlink() or folder.parent.name != "snapshots":
        return None
    content = path.resolve()
    is_blob = content.parent == (folder.parent.parent / "blobs").resolve()
    return content.name if is_blob and SHA256.fullmatch(content.name) else None


class _KeptHashes:
    """The hashes of files that were read before, in the user's cache."""

    def __init__(self) -> None:
        self._file = cache_folder() / "weights.json"
        try:
            self._read = json.loads(self._file.read_text())
        except (OSError, ValueError, RecursionError):
            self._read = None
        found = self._read.items() if isinstance(self._read, dict) else ()
        self._known = {
            file: sha for file, sha in found if isinstance(sha, str) and SHA256.fullmatch(sha)
        }

    def find(self, path: Path) -> str | None:
        return self._known.get(_identity(path))

    def add(self, hashes: Mapping[Path, str]) -> None:
        """Keeps further hashes, if there is a place to keep them."""
        self._known |= {_identity(path): content for path, content in hashes.items()}
        if self._known == self._read or not hashes:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(self._known))
        except OSError as error:
            logger.warning("cannot cache the hash of the weights: %s", error)


def _identity(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_ino}:{status.st_mtime_ns}"
