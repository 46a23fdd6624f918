"""Quantises a teacher's linear layers while it is loaded, with the package that the method names.

The embeddings and the vocabulary head keep the dtype of the model: what targets are selected from is
not rounded again. transformers' quantizers do the work; this module chooses their settings, refuses
what would not be quantised, and counts bytes.
"""

import importlib.metadata
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitstream.extras import check_installed
from teacher_server.errors import ModelError

logger = logging.getLogger(__name__)
# They warn of every library of GPU kernels that they cannot load, also where none is needed.
for name in ("torchao", "bitsandbytes"):
    logging.getLogger(name).setLevel(logging.ERROR)

PACKAGES = {
    "torchao-fp8": "torchao",
    "torchao-int8": "torchao",
    "bitsandbytes-4bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
}
"""The distribution that each method needs; the extra [quantize] has all of them."""
FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply fp8."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Says how a teacher is quantised, and what transformers is given for it."""

    method: str = "none"
    settings: Any = None
    """A quantisation config of transformers; None where the checkpoint's own says it all."""

    @property
    def name(self) -> str:
        """The method and the version of its package, such as "torchao-int8 0.18.0"."""
        distribution = PACKAGES.get(self.method)
        if distribution is None:
            return self.method
        return f"{self.method} {importlib.metadata.version(distribution)}"


def check_packages(quantization: str, model: str) -> None:
    """Raises ModelError if the package of a method, or of a quantised checkpoint, is missing."""
    method = quantization
    if method == "none":
        try:
            config = json.loads((Path(model) / "config.json").read_text())
            method = _method_of(config.get("quantization_config"))
        except (OSError, ValueError, AttributeError, RecursionError):
            return  # not a folder, or one that loading refuses with its reasons
    if distribution := PACKAGES.get(method):
        try:
            check_installed("quantize", distribution.replace("-", "_"))
        except ValueError as error:
            raise ModelError(f"quantization {method}: {error}") from None


def choose_quantization(
    quantization: str, config: Any, *, model: str, device: str, dtype: Any
) -> Quantization:
    """Returns how a model with this config is to be quantised. Raises ModelError if it cannot be.

    dtype: of what is not quantised, or "auto".
    """
    saved = _method_of(getattr(config, "quantization_config", None))
    if saved == "none":
        saved = _method_of(getattr(config.get_text_config(), "quantization_config", None))
    if quantization not in ("none", *PACKAGES):
        raise ModelError(f"quantization must be none, {', '.join(PACKAGES)}; got {quantization!r}")
    if quantization != "none" and saved not in ("none", quantization):
        raise ModelError(
            f"{model} was saved quantised with {saved}, and cannot be quantised with {quantization}. "
            "Leave out --quantization to load it as it is, or give the model that it was made from."
        )
    if quantization == "compressed-tensors" and saved == "none":
        raise ModelError(
            f"{model} is no compressed-tensors checkpoint: its config.json has no "
            "quantization_config. Give one (llm-compressor writes them), or use torchao-int8."
        )
    method = saved if quantization == "none" else quantization
    check_packages(method, model)
    if dtype == "auto":
        dtype = getattr(config.get_text_config(), "dtype", None)
    if method == "torchao-fp8":
        _check_fp8(device, dtype)
    return Quantization(method, _make_settings(method, saved, dtype))


def check_undivided(quantization: Quantization) -> None:
    """Raises ModelError if a teacher that is divided among devices would be quantised."""
    if quantization.method != "none":
        raise ModelError(
            f"a teacher quantised with {quantization.method} cannot be divided among devices yet. "
            "Leave out --tensor-parallel-size, or serve the model without quantization."
        )


def _method_of(saved: Any) -> str:
    """Names the method of a checkpoint from the quantization_config that it was saved with."""
    if not saved:
        return "none"
    if not isinstance(saved, dict):
        saved = saved.to_dict()
    method = saved.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes":
        is_four = saved.get("load_in_4bit") or saved.get("_load_in_4bit")
        return "bitsandbytes-4bit" if is_four else "bitsandbytes-8bit"
    if method == "torchao":
        kind = str(saved.get("quant_type"))
        is_fp8 = "Float8DynamicActivationFloat8Weight" in kind
        return "torchao-int8" if "Int8WeightOnly" in kind else f"torchao{'-fp8' * is_fp8}"
    return method


def _check_fp8(device: str, dtype: Any) -> None:
    import torch

    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ModelError(
            f"torchao-fp8 needs a GPU that multiplies fp8 (compute capability 8.9: L40S, H100, H200 "
            f"or later), got device {device}. Use torchao-int8, which runs everywhere."
        )
    if dtype != torch.bfloat16:
        raise ModelError(f"torchao-fp8 needs dtype bfloat16, got {dtype}. Pass --dtype bfloat16.")


def _make_settings(method: str, saved: str, dtype: Any) -> Any:
    """Makes the config for transformers. Imports the package."""
    import torch
    import transformers

    if method == "compressed-tensors":
        # Decompressed while it is loaded: plain layers, whose products are tiled as ever.
        return transformers.CompressedTensorsConfig(dequantize=True)
    if saved != "none" or method == "none":
        return None
    if method == "bitsandbytes-4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype or torch.float32,
        )
    from torchao import quantization as ao  # pyright: ignore[reportMissingImports]

    if method == "torchao-int8":
        return transformers.TorchAoConfig(ao.Int8WeightOnlyConfig(set_inductor_config=False))
    return transformers.TorchAoConfig(
        ao.Float8DynamicActivationFloat8WeightConfig(
            granularity=ao.PerRow(), set_inductor_config=False
        )
    )


def check_quantized(causal_lm: Any, quantization: Quantization) -> None:
    """Raises ModelError if a method left every layer as it was, and logs what it did."""
    if quantization.method not in PACKAGES or quantization.method == "compressed-tensors":
        return
    from torch import nn

    modules = [one for one in causal_lm.modules() if isinstance(one, nn.Embedding)]
    edges = {id(one.weight) for one in (*modules, causal_lm.get_output_embeddings())}
    quantized = 0
    plain: dict[str, int] = {}
    for name, parameter in causal_lm.named_parameters():
        if is_quantized(parameter):
            quantized += 1
        elif parameter.dim() > 1 and id(parameter) not in edges:
            plain[name] = parameter.nbytes
    architecture = type(causal_lm).__name__
    if not quantized:
        raise ModelError(
            f"{quantization.method} quantises no layer of {architecture}: it knows torch's Linear "
            "only. Use bitsandbytes-4bit, which also knows Conv1D (GPT-2), or none."
        )
    logger.info(
        "quantised architecture=%s method=%s layers=%d weights=%.2f GiB",
        architecture,
        quantization.name,
        quantized,
        weights_nbytes(causal_lm) / 2**30,
    )
    if plain:
        logger.warning(
            "%s does not know %d weights of %s that are neither embeddings nor head, such as %s: %.2f "
            "GiB stay as they are",
            quantization.method,
            len(plain),
            architecture,
            max(plain, key=plain.__getitem__),
            sum(plain.values()) / 2**30,
        )


def keep_dtype(causal_lm: Any) -> None:
    """Makes bitsandbytes multiply in the model's dtype on every CPU.

    On one with AVX512-BF16 it would round inputs and scales to bfloat16 whatever the dtype is, and the
    same teacher would give other answers there than on other CPUs.
    """
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantization_of(causal_lm: Any) -> Quantization:
    """Says how a model that is in memory was quantised, from its config."""
    return Quantization(_method_of(getattr(causal_lm.config, "quantization_config", None)))


def is_quantized(parameter: Any) -> bool:
    """Whether a parameter holds quantised weights, in place of one number for each of them."""
    return hasattr(parameter, "quant_state") or hasattr(parameter, "__tensor_flatten__")


def weights_nbytes(causal_lm: Any) -> int:
    """Returns the bytes of a model's weights in memory, with their scales; shared ones once."""
    found = {
        tensor.data_ptr(): tensor.nbytes
        for parameter in causal_lm.parameters()
        for tensor in plain_tensors(parameter)
    }
    return sum(found.values())


def plain_tensors(tensor: Any) -> Iterator[Any]:
    """Yields the tensors that a weight is made of: numbers, scales, zero points."""
    if hasattr(tensor, "__tensor_flatten__"):  # of torchao
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
        return
    yield tensor.data
    if (state := getattr(tensor, "quant_state", None)) is not None:  # of bitsandbytes
        yield from (state.absmax, state.code)
