"""`teacher-server compare`: measures how far the distributions of two teachers are apart."""

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from teacher_server.compare_config import CompareConfig
from teacher_server.engine.quantization import check_packages
from teacher_server.errors import ModelError, TeacherServerError

if TYPE_CHECKING:
    from teacher_server.engine.loading import Outline


def run_compare(config: CompareConfig) -> int:
    """Loads both, compares them, and prints what it found; returns the exit code."""
    try:
        check_packages(config.quantization_a, config.a)
        check_packages(config.quantization_b, config.b)
    except ModelError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 2
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        found = compare(config)
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        print(f"teacher-server: cannot read {config.text}: {why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(found, indent=2) if config.as_json else _as_table(found))
    return 0


def compare(config: CompareConfig) -> dict[str, Any]:
    """Returns what the command prints. Raises ModelError, and OSError for the text."""
    import dataclasses

    from teacher_server.engine import comparison
    from teacher_server.engine.loading import load, read_outline

    text = config.text.read_text(encoding="utf-8")
    first, second = read_outline(config.a), read_outline(config.b)
    sequences = comparison.cut_text(
        _shared_tokenizer(config, first, second),
        text,
        max_tokens=config.max_tokens,
        sequence_tokens=min(
            config.sequence_tokens, first.max_sequence_tokens, second.max_sequence_tokens
        ),
    )
    held = [
        comparison.hold(
            partial(load, model, device=config.device, dtype=dtype, quantization=quantization),
            sequences,
        )
        for model, dtype, quantization in (
            (config.a, config.dtype_a, config.quantization_a),
            (config.b, config.dtype_b, config.quantization_b),
        )
    ]
    next_ids = comparison.next_ids_of(sequences)
    measures = comparison.compare_states(held[0], held[1], next_ids)
    return {
        "a": dataclasses.asdict(held[0].identity),
        "b": dataclasses.asdict(held[1].identity),
        "tokens": sum(map(len, sequences)),
        "rows": len(next_ids),
        **measures.summary(),
    }


def _shared_tokenizer(config: CompareConfig, first: "Outline", second: "Outline") -> Any:
    """Returns the tokenizer of both. Raises ModelError if there is none, or if they differ."""
    from logit_codec import tokenizer_fingerprint

    one, other = first.tokenizer, second.tokenizer
    if one is None and other is None:
        raise ModelError(f"neither {config.a} nor {config.b} has a tokenizer to read the text with")
    if one and other and tokenizer_fingerprint(one) != tokenizer_fingerprint(other):
        raise ModelError(
            f"{config.a} and {config.b} have different tokenizers: distributions can be compared "
            "only token by token, over the same vocabulary"
        )
    # Of one tokenizer, only the padding of the heads may differ.
    if not (one and other) and first.vocab_size != second.vocab_size:
        raise ModelError(
            f"{config.a} has {first.vocab_size:,} ids and {config.b} {second.vocab_size:,}, and not "
            "both have a tokenizer: distributions can be compared only over the same vocabulary"
        )
    return one or other


def _as_table(found: dict[str, Any]) -> str:
    lines = []
    for name in ("a", "b"):
        one = found[name]
        lines.append(
            f"{name:16} {one['model']}, {one['dtype']}, quantization {one['quantization']}, "
            f"{one['weights_nbytes'] / 2**20:,.1f} MiB of weights, {one['device']}"
        )
    lines.append(f"{'tokens':16} {found['tokens']:,} ({found['rows']:,} rows)")
    for name, label in (("kl", "KL(A || B)"), ("reverse_kl", "KL(B || A)")):
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in found[name].items())
        lines.append(f"{label:16} {numbers} (nats)")
    lines.append(f"{'top-1 agreement':16} {100 * found['top1_agreement']:.2f} %")
    lines.append(
        f"{'logprob error':16} {found['logprob_error']:.3g} nats (mean, of the next token)"
    )
    lines.append(f"{'log Z error':16} {found['log_z_error']:.3g} nats (mean)")
    return "\n".join(lines)
