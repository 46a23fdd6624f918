"""Loads a teacher and turns tokens into final hidden states.

Letters: B sequences, L tokens of a padded sequence, D hidden size, V vocabulary.

Any causal LM of transformers, from safetensors only. Each sequence is padded on the right to its
own canonical length, never to its neighbours', and no attention mask is passed: causal attention
keeps the padding out of every real row, and the shape of the computation, and so its rounding,
depends on the sequence alone.
"""

import copy
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from logit_codec import FORMAT_VERSION, CodecError, IdTable, tokenizer_fingerprint
from logit_codec.selection import ARITHMETIC as SELECTION_ARITHMETIC
from teacher_server.errors import ModelError

logger = logging.getLogger(__name__)

MIN_BUCKET = 32
"""Shortest padded length: products of fewer rows round differently."""
HEAD_ARITHMETIC = "model-forward-1"
"""Name of how logits are made from hidden states; part of the fingerprint."""
SHA256 = re.compile(r"[0-9a-f]{64}")
ID_TABLE_NAME = "id_table.bin"
"""Beside the weights of a model, if it was fitted."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bucket_length(num_tokens: int, max_tokens: int) -> int:
    """The canonical padded length of a sequence of `num_tokens`: at most 1/8 longer from 256 on.

    Multiples of 32 up to 256, then eighths of a power of two; never above `max_tokens`.
    """
    step = max(MIN_BUCKET, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return min(-(-num_tokens // step) * step, max_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class TeacherModel:
    """A causal LM that is ready to score, and what identifies it."""

    causal_lm: Any
    tokenizer: Any | None
    name: str
    revision: str
    weights_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    """V: rows of the head."""
    effective_vocab_size: int
    """Ids from here on are padding rows of the head, with probability 0."""
    max_sequence_tokens: int
    head: nn.Module = field(repr=False)
    """The causal LM with its base model taken out: hidden states in, logits out."""
    id_table: IdTable | None = None
    """Fitted to this teacher by `teacher-server fit-ids`; shortens the ids of targets."""

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.causal_lm.dtype

    @property
    def architecture(self) -> str:
        return type(self.causal_lm).__name__

    @property
    def attention(self) -> str:
        return self.causal_lm.config._attn_implementation

    @property
    def has_experts(self) -> bool:
        config = self.causal_lm.config.get_text_config()
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return any((getattr(config, name, None) or 0) > 1 for name in names)

    @property
    def _config(self) -> dict[str, Any]:
        """What decides the arithmetic: softcaps, windows, scales; not names and versions."""
        volatile = {"_name_or_path", "transformers_version", "architectures", "use_cache"}
        content = self.causal_lm.config.to_dict()
        return {name: value for name, value in content.items() if name not in volatile}

    @property
    def teacher_fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides the bytes of an answer."""
        parts = {
            "weights": self.weights_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "effective_vocab_size": self.effective_vocab_size,
            "architecture": self.architecture,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "attention": self.attention,
            "head": HEAD_ARITHMETIC,
            "selection": SELECTION_ARITHMETIC,
            "config": self._config,
            "buckets": [bucket_length(n, 2**20) for n in (2, 300, 5000)],
            "max_sequence_tokens": self.max_sequence_tokens,  # caps the buckets
            "format": FORMAT_VERSION,
            "id_table": "" if self.id_table is None else self.id_table.digest.hex(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def bucket_length(self, num_tokens: int) -> int:
        return bucket_length(num_tokens, self.max_sequence_tokens)

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[Tensor]) -> Tensor:
        """Sequences of one canonical length, (l,) int64 each -> (B, L, D) final hidden states.

        Rows from a sequence's own length on are padding and mean nothing.
        """
        length = self.bucket_length(len(sequences[0]))
        ids_BL = torch.zeros(len(sequences), length, dtype=torch.int64)
        for row, sequence in zip(ids_BL, sequences, strict=True):
            row[: len(sequence)] = sequence
        output = self.causal_lm.base_model(input_ids=ids_BL.to(self.device), use_cache=False)
        return output.last_hidden_state

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(C, D) hidden states -> (C, V) logits, by the model's own head arithmetic and dtype."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0]


def load(
    model: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    max_sequence_tokens: int | None = None,
) -> TeacherModel:
    """The teacher in a Hugging Face folder, or of a hub id that can be fetched.

    Raises ModelError, saying what was looked for, if it cannot be served.
    """
    folder, revision = _resolve(model, revision)
    _expect_safetensors(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"device {device} was asked for, and torch finds no CUDA device. Use --device cpu."
        )
    wanted = "auto" if dtype == "auto" else DTYPES.get(dtype)
    if wanted is None:
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if attention is None and getattr(config, "attn_logit_softcapping", None):
            attention = "eager"  # the only implementation that applies the softcap everywhere
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=wanted,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        causal_lm, report = loaded
        causal_lm = causal_lm.to(device)
    except Exception as error:  # a folder can be wrong in any way; all of them mean the same here
        raise ModelError(
            f"cannot load a causal LM from {model}: {_first_line(error)} "
            "Any AutoModelForCausalLM saved with save_pretrained (safetensors) works."
        ) from error
    if report["mismatched_keys"]:
        raise ModelError(
            f"{model}: weight {_name(report['mismatched_keys'])} does not have the shape that its "
            "config.json says. Save config and weights together with save_pretrained."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{model} lacks {len(missing)} weights of {type(causal_lm).__name__}, such as "
            f"{missing[0]}: it was saved from another kind of model. Save the causal LM itself."
        )
    return prepare(
        causal_lm,
        _load_tokenizer(folder),
        name=folder.name if Path(model).is_dir() else model,
        revision=revision,
        weights_fingerprint=_folder_fingerprint(folder, revision),
        max_sequence_tokens=max_sequence_tokens,
        id_table=load_id_table(folder),
    )


def load_id_table(folder: Path) -> IdTable | None:
    """The table beside a model, if there is one. Raises ModelError if it cannot be read."""
    path = folder / ID_TABLE_NAME
    if not path.is_file():
        return None
    try:
        return IdTable.from_bytes(path.read_bytes())
    except (CodecError, OSError) as error:
        raise ModelError(
            f"cannot read {path}: {error}. Fit it again with teacher-server fit-ids, or delete it."
        ) from error


def prepare(
    causal_lm: Any,
    tokenizer: Any | None = None,
    *,
    name: str = "local",
    revision: str = "",
    weights_fingerprint: str | None = None,
    max_sequence_tokens: int | None = None,
    id_table: IdTable | None = None,
) -> TeacherModel:
    """A causal LM that is in memory, checked and ready to score.

    Raises ModelError if its logits cannot be computed from its base model's hidden states.
    """
    causal_lm.eval().requires_grad_(False)
    config = causal_lm.config.get_text_config()
    embeddings = causal_lm.get_output_embeddings()
    if embeddings is None or causal_lm.base_model is causal_lm:
        raise ModelError(f"{type(causal_lm).__name__} has no vocabulary head apart from its base")
    vocab_size = embeddings.weight.shape[0]
    effective = vocab_size
    if tokenizer is not None:
        effective = min(vocab_size, max(tokenizer.get_vocab().values()) + 1)
    longest = getattr(config, "max_position_embeddings", None) or 2**20
    if max_sequence_tokens is not None:
        longest = min(longest, max_sequence_tokens)
    if weights_fingerprint is None:
        weights_fingerprint = _state_fingerprint(causal_lm)
    model = TeacherModel(
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        weights_fingerprint=weights_fingerprint,
        tokenizer_fingerprint="" if tokenizer is None else tokenizer_fingerprint(tokenizer),
        vocab_size=vocab_size,
        effective_vocab_size=effective,
        max_sequence_tokens=longest,
        head=_headed(causal_lm),
        # Where the targets are made, so that no answer copies it there.
        id_table=None if id_table is None else id_table.to(causal_lm.device),
    )
    if id_table is not None and id_table.vocab_size != vocab_size:
        raise ModelError(
            f"{ID_TABLE_NAME} is for a vocabulary of {id_table.vocab_size} ids, the model has "
            f"{vocab_size}. Fit it again with teacher-server fit-ids, or delete it."
        )
    _check_head(model)
    return model


class _Passed:
    """What a base model returns, holding nothing but the hidden states it was given."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class _PassThrough(nn.Module):
    """Stands in for the base model, so that the model's own forward does only its head arithmetic.

    Scales, softcaps and biases differ between architectures (Gemma 2, Cohere, Granite); their own
    code is the one place where they are right.
    """

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _Passed:
        return _Passed(inputs_embeds)


def _headed(causal_lm: Any) -> nn.Module:
    """A shallow copy of the causal LM with the stand-in for its base model; weights are shared."""
    head = copy.copy(causal_lm)
    head._modules = dict(causal_lm._modules)
    head._modules[causal_lm.base_model_prefix] = _PassThrough()
    return head


@torch.inference_mode()
def _check_head(model: TeacherModel) -> None:
    """Compares base model + head with one full forward, and looks whether rows see later tokens.

    Raises ModelError above tolerance.
    """
    length = min(MIN_BUCKET, model.max_sequence_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.effective_vocab_size, (length,), generator=generator)
    hidden = model.hidden_states([ids])[0]
    ours = model.logits(hidden).float()
    whole = model.causal_lm(input_ids=ids[None].to(model.device), use_cache=False).logits
    theirs = whole[0].float()
    scale = max(1.0, float(theirs.abs().max()))
    worst = float((ours - theirs).abs().max()) / scale
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    if not worst <= tolerance:
        raise ModelError(
            f"the logits of {model.architecture} are not those of its head applied to its base "
            f"model's hidden states: off by {worst:.1e} of the largest, allowed {tolerance:.0e}. "
            "This architecture cannot be served yet."
        )
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % model.effective_vocab_size
    before = model.hidden_states([changed])[0][: length - 1].float()
    moved = float((before - hidden[: length - 1].float()).abs().max())
    if not moved <= tolerance * max(1.0, float(hidden.float().abs().max())):
        raise ModelError(
            f"{model.architecture} is not causal: a row changes with the tokens after it. A "
            "teacher predicts the next token (AutoModelForCausalLM with causal attention)."
        )
    logger.info("head checked architecture=%s error=%.1e", model.architecture, worst)


def _resolve(model: str, revision: str | None) -> tuple[Path, str]:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{model} is not a model folder: it has no config.json. Give a folder written by "
                "save_pretrained, or a hub id such as google/gemma-2-2b."
            )
        return folder.resolve(), revision or ""
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(
            f"there is no folder {model}. Give a folder written by save_pretrained, or a hub id "
            "such as google/gemma-2-2b."
        )
    import huggingface_hub

    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt"],
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise ModelError(
            f"there is no folder {model}, and no model of that name could be fetched from the "
            f"hub ({type(error).__name__}). Give a folder written by save_pretrained."
        ) from error
    return snapshot, snapshot.name


def _expect_safetensors(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no *.safetensors file. Only safetensors weights are loaded; save the "
            "model again with save_pretrained."
        )


def _load_tokenizer(folder: Path) -> Any | None:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        logger.warning("no tokenizer in %s: clients cannot check theirs against it", folder.name)
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            tokenizer_fingerprint(tokenizer)
        except Exception as error:  # as above: files of a tokenizer can be wrong in any way
            raise ModelError(
                f"cannot load the tokenizer in {folder}: {_first_line(error)} Save it again with "
                "save_pretrained, or remove its files to serve without one."
            ) from error
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _name(keys: Any) -> str:
    """The first of transformers' mismatched keys, which are names or tuples that begin with one."""
    first = sorted(keys, key=str)[0]
    return first if isinstance(first, str) else str(first[0])


def _folder_fingerprint(folder: Path, revision: str) -> str:
    """SHA-256 over the revision and the name, size and content hash of every safetensors file.

    A file's header is part of its content. The hash of a file is kept under its path, size,
    inode and time of change, so that a restart does not read a large teacher twice.
    """
    digest = hashlib.sha256(revision.encode())
    cache_file = _cache_folder() / "weights.json"
    try:
        cache = json.loads(cache_file.read_text())
    except (OSError, ValueError, RecursionError):
        cache = None
    kept = cache.items() if isinstance(cache, dict) else ()
    known = {one: sha for one, sha in kept if isinstance(sha, str) and SHA256.fullmatch(sha)}
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        identity = f"{path.resolve()}:{status.st_size}:{status.st_ino}:{status.st_mtime_ns}"
        if identity not in known:
            with path.open("rb") as file:
                known[identity] = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}:{status.st_size}:{known[identity]}\n".encode())
    if known != cache:
        try:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache_file.with_name(f"{cache_file.name}.{os.getpid()}")
            temporary.write_text(json.dumps(known))
            temporary.replace(cache_file)
        except OSError as error:
            logger.warning("cannot keep the hash of the weights: %s", error)
    return digest.hexdigest()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "logitstream"


def _state_fingerprint(causal_lm: nn.Module) -> str:
    """SHA-256 over names, shapes and contents of a model in memory."""
    digest = hashlib.sha256()
    for name, content in _state_bytes(causal_lm):
        digest.update(name.encode())
        digest.update(content)
    return digest.hexdigest()


def _state_bytes(causal_lm: nn.Module) -> Iterator[tuple[str, memoryview]]:
    for name, tensor in sorted(causal_lm.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield f"{name}:{tuple(tensor.shape)}:{tensor.dtype}", memoryview(raw.numpy())
