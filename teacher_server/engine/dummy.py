"""Makes a teacher with random weights from its config.json alone, for benchmarks and plans.

Such a teacher costs what the real one costs: memory, time and bytes depend on shapes, not values.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

SEED = 0
REVISION = f"random weights (load format dummy, seed {SEED})"
"""Stands where a real teacher names the revision of its weights, for everyone who asks."""


def make_dummy(
    config: Any, *, device: str, dtype: torch.dtype | None = None, attention: str | None = None
) -> Any:
    """Returns the causal LM of a config with weights drawn from SEED, made on the device.

    transformers draws them, as for weights that a checkpoint lacks: it knows how each architecture
    begins, which weights are tied and what its buffers hold. dtype: by default the config's.
    """
    # Without memory: only the class is wanted, which AutoModel says in no other way.
    with torch.device("meta"):
        kind = type(transformers.AutoModelForCausalLM.from_config(config))
    seeded = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=seeded), quiet_transformers():
        torch.manual_seed(SEED)
        return kind.from_pretrained(
            None,
            config=config,
            state_dict={},
            dtype=dtype or _own_dtype(config),
            attn_implementation=attention,
            device_map={"": device},
        )


def _own_dtype(config: Any) -> torch.dtype:
    """Returns the type that a config says its weights were saved in."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own report and progress bar, which list every weight, off stderr."""
    log = transformers.utils.logging
    verbosity, has_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if has_bar:
            log.enable_progress_bar()
