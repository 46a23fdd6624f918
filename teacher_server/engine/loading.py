"""Loads a teacher from a folder or the hub, and checks its head."""

import copy
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from logit_codec import CodecError, IdTable, tokenizer_fingerprint
from logit_codec.vocabulary_part import VocabularyPart
from logitstream.logs import first_line
from teacher_server.engine.checks import can_pack, check_head, head_tolerance
from teacher_server.engine.client_head import make_client_head
from teacher_server.engine.dummy import REVISION, SEED, make_dummy
from teacher_server.engine.fingerprints import fingerprint_dummy, fingerprint_state
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.quantization import (
    Quantization,
    check_packages,
    check_quantized,
    check_undivided,
    choose_quantization,
    keep_dtype,
    quantization_of,
)
from teacher_server.engine.tensor_parallel import Rank, check_divisible, divide, take_part
from teacher_server.engine.weight_files import read_weights
from teacher_server.errors import ModelError

logger = logging.getLogger(__name__)


ID_TABLE_NAME = "id_table.bin"
"""File of the fitted id table, beside the weights."""


LOAD_FORMATS = ("auto", "dummy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    attention: str | None = None,
    max_sequence_tokens: int | None = None,
    load_format: str = "auto",
    rank: Rank | None = None,
) -> TeacherModel:
    """Loads the teacher from a Hugging Face folder or the hub.

    quantization: none, which leaves it as it was saved, or a method of quantization.PACKAGES; not for
    dummies nor ranks. load_format: auto reads its safetensors; dummy reads no weights, but makes random
    ones of the shapes that its config.json says. rank: load the part of one of several ranks; all of
    them call this at once.
    Raises ModelError, which says what was looked for, if it cannot be served.
    """
    if load_format not in LOAD_FORMATS:
        raise ModelError(f"load format must be {' or '.join(LOAD_FORMATS)}; got {load_format!r}")
    is_dummy = load_format == "dummy"
    if not is_dummy:
        check_packages(quantization, model)
    folder, revision = _resolve(model, revision, with_weights=not is_dummy)
    if not is_dummy:
        _expect_safetensors(folder)
    device = _find_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        implementation = attention or _needed_attention(config)
        if rank is not None:
            check_divisible(config, rank.count, is_dummy=is_dummy)
        precision, weights = "none", ""
        if is_dummy:
            causal_lm = make_dummy(
                config, device=device, dtype=DTYPES.get(dtype), attention=implementation
            )
        else:
            wanted = DTYPES.get(dtype, "auto")
            chosen = choose_quantization(
                quantization, config, model=model, device=device, dtype=wanted
            )
            precision = chosen.name
            with read_weights(folder, revision, quiet=rank is not None and rank.index > 0) as read:
                causal_lm = _load_causal_lm(
                    folder, config, wanted, implementation, device, chosen, rank
                )
                weights = read.fingerprint()
    except ModelError:
        raise
    except Exception as error:  # a folder can be wrong in any way; all of them mean the same here
        raise ModelError(
            f"cannot load a causal LM from {model}: {first_line(error)} "
            "Any AutoModelForCausalLM saved with save_pretrained (safetensors) works."
        ) from error
    if is_dummy:
        logger.warning(
            "the weights of %s are random (load format dummy): what this teacher answers means "
            "nothing, only how fast it answers",
            model,
        )
        weights, revision = fingerprint_dummy(causal_lm.config, SEED), REVISION
    return prepare(
        causal_lm,
        _load_tokenizer(folder),
        name=folder.name if Path(model).is_dir() else model,
        revision=revision,
        weights_fingerprint=weights,
        max_sequence_tokens=max_sequence_tokens,
        id_table=None if is_dummy else load_id_table(folder),
        packed=attention is None,
        part=None if rank is None else take_part(causal_lm, rank),
        quantization=precision,
    )


def _find_device(device: str) -> str:
    """Returns the device that is meant. Raises ModelError if there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device is {device}, but torch finds no CUDA device. Use --device cpu.")
    return device


def _needed_attention(config: Any) -> str | None:
    """Names the only implementation that applies a softcap everywhere, for a model that has one."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def _load_causal_lm(
    folder: Path,
    config: Any,
    dtype: Any,
    attention: str | None,
    device: str,
    quantization: Quantization,
    rank: Rank | None,
) -> Any:
    """Returns the model, on its device. Raises ModelError for weights that are missing or differ."""
    placement: dict[str, Any] = {"device_map": {"": device}}
    if rank is not None:
        check_undivided(quantization)
        placement = {"distributed_config": divide(rank)}
    elif quantization.method != "none":
        placement = {"quantization_config": quantization.settings} | placement
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        ignore_mismatched_sizes=True,  # _check_weights refuses them by name
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **placement,
    )
    causal_lm, report = loaded
    _check_weights(str(folder), type(causal_lm).__name__, report)
    check_quantized(causal_lm, quantization)
    return causal_lm


def _check_weights(model: str, architecture: str, report: dict[str, Any]) -> None:
    """Raises ModelError if weights are missing or have another shape."""
    if report["mismatched_keys"]:
        raise ModelError(
            f"{model}: weight {_name(report['mismatched_keys'])} does not have the shape that its "
            "config.json says. Save config and weights together with save_pretrained."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{model} lacks {len(missing)} weights of {architecture}, such as "
            f"{missing[0]}: it was saved from another kind of model. Save the causal LM itself."
        )


def load_id_table(folder: Path) -> IdTable | None:
    """Loads the table beside a model, if there is one. Raises ModelError if it is damaged."""
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
    packed: bool = True,
    part: VocabularyPart | None = None,
    quantization: str | None = None,
) -> TeacherModel:
    """Checks a causal LM that is in memory and makes it ready to score.

    packed: run packs if the architecture allows it; else its own attention, on padded sequences.
    part: which ids the causal LM has logits of, if other ranks have the others. quantization: how it
    was quantised, and the version of the package; by default what its config says.
    Raises ModelError if its logits cannot be computed from its base model's hidden states.
    """
    causal_lm.eval().requires_grad_(False)
    keep_dtype(causal_lm)
    config = causal_lm.config.get_text_config()
    embeddings = causal_lm.get_output_embeddings()
    if embeddings is None or causal_lm.base_model is causal_lm:
        raise ModelError(f"{type(causal_lm).__name__} has no vocabulary head apart from its base")
    vocab_size = embeddings.weight.shape[0] if part is None else part.vocab_size
    effective = vocab_size
    if tokenizer is not None:
        effective = min(vocab_size, max(tokenizer.get_vocab().values()) + 1)
    longest = _longest_sequence(config)
    if max_sequence_tokens is not None:
        longest = min(longest, max_sequence_tokens)
    if weights_fingerprint is None:
        weights_fingerprint = fingerprint_state(causal_lm)
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
        head=_make_head(causal_lm),
        # On the device where the targets are made, so that no answer has to copy it there.
        id_table=None if id_table is None else id_table.to(causal_lm.device),
        stop_ids=_find_stop_ids(causal_lm, vocab_size),
        part=part,
        quantization=quantization or quantization_of(causal_lm).name,
    )
    if id_table is not None and id_table.vocab_size != vocab_size:
        raise ModelError(
            f"{ID_TABLE_NAME} is for a vocabulary of {id_table.vocab_size} ids, the model has "
            f"{vocab_size}. Fit it again with teacher-server fit-ids, or delete it."
        )
    check_head(model)
    return replace(
        model,
        is_packed=packed and can_pack(model),
        client_head=make_client_head(model, head_tolerance(model)),
    )


def _find_stop_ids(causal_lm: Any, vocab_size: int) -> tuple[int, ...]:
    """Reads the ids at which texts end, from the generation config or else the model's own."""
    for config in (
        getattr(causal_lm, "generation_config", None),
        causal_lm.config.get_text_config(),
    ):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            ids = {found} if isinstance(found, int) else {*found}
            return tuple(sorted(one for one in ids if 0 <= one < vocab_size))
    return ()


class _Passed:
    """Imitates the output of a base model that returns the hidden states it was given."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class _PassThrough(nn.Module):
    """Stands in for the base model, so that the model's own forward runs only its head.

    Scales, softcaps and biases differ between architectures (Gemma 2, Cohere, Granite); their own
    code is the one place where they are right.
    """

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _Passed:
        return _Passed(inputs_embeds)


def _make_head(causal_lm: Any) -> nn.Module:
    """Copies the causal LM with a stand-in for its base model; the weights are shared."""
    head = copy.copy(causal_lm)
    head._modules = dict(causal_lm._modules)
    head._modules[causal_lm.base_model_prefix] = _PassThrough()
    return head


def _resolve(model: str, revision: str | None, *, with_weights: bool) -> tuple[Path, str]:
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

    patterns = ["*.json", "tokenizer*", "*.model", "*.txt"]
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*patterns, "*.safetensors"] if with_weights else patterns,
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise ModelError(
            f"there is no folder {model}, and no model of that name could be fetched from the "
            f"hub ({type(error).__name__}). If the download broke off, start again: files that are "
            "complete are kept. Else give a folder written by save_pretrained."
        ) from error
    return snapshot, snapshot.name


def _expect_safetensors(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no *.safetensors file. Only safetensors weights are loaded; save the "
            "model again with save_pretrained."
        )


@dataclass(frozen=True, slots=True)
class Outline:
    """Holds what is known of a model whose weights have not been read."""

    tokenizer: Any | None
    vocab_size: int
    max_sequence_tokens: int


def read_outline(model: str) -> Outline:
    """Reads config and tokenizer of a folder or hub id. Raises ModelError."""
    folder, _ = _resolve(model, None, with_weights=False)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as in `load`
        raise ModelError(f"cannot read config.json of {model}: {first_line(error)}") from error
    config = config.get_text_config()
    return Outline(_load_tokenizer(folder), config.vocab_size, _longest_sequence(config))


def _longest_sequence(config: Any) -> int:
    return getattr(config, "max_position_embeddings", None) or 2**20


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
                f"cannot load the tokenizer in {folder}: {first_line(error)} Save it again with "
                "save_pretrained, or remove its files to serve without one."
            ) from error
    return tokenizer


def _name(keys: Any) -> str:
    """The first of transformers' mismatched keys, which are names or tuples that begin with one."""
    first = sorted(keys, key=str)[0]
    return first if isinstance(first, str) else str(first[0])
