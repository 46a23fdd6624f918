"""Checks, before a teacher is served, that what is computed in parts is what the model computes.

Letters: L tokens of a sequence, D hidden size.
"""

import logging

import torch
from torch import Tensor

from logit_codec import TopKSpec
from logitstream.logs import first_line
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.model import MIN_BUCKET, TeacherModel
from teacher_server.engine.packing import Packer
from teacher_server.errors import ModelError

logger = logging.getLogger(__name__)

PACKED_LENGTHS = (9, 40, 2, 33)
"""Of the sequences that are packed to see whether an architecture keeps them apart."""
PACKED_TILES = (16, 8)
"""So small that these sequences are in tiles of both sizes."""


def head_tolerance(model: TeacherModel) -> float:
    """Returns how far results may be apart that are rounded otherwise, as a share of the largest."""
    return 1e-4 if model.dtype == torch.float32 else 2e-2


def pack_tolerance(model: TeacherModel) -> float:
    """Returns how far a row of a pack may be from the same row alone, as a share of its length.

    In float32 rounding is far below any mistake. In the shorter types it grows with the layers
    (measured: 0.3 to 0.6 of epsilon times the root of their number, random weights, 4 to 80 layers),
    and stays far below a row that sees another sequence, which moves by its own length.
    """
    if model.dtype == torch.float32:
        return 1e-4
    return 2 * torch.finfo(model.dtype).eps * max(1, model.num_layers) ** 0.5


def _random_ids(model: TeacherModel, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.effective_vocab_size, (length,), generator=generator)


@torch.inference_mode()
def check_head(model: TeacherModel) -> None:
    """Raises ModelError if base model and head differ from one full forward pass."""
    length = min(MIN_BUCKET, model.max_sequence_tokens)
    ids = _random_ids(model, length, seed=0)
    hidden = model.padded_hidden_states([ids])[0]
    logits = model.logits(hidden).float()
    output = model.causal_lm(input_ids=ids[None].to(model.device), use_cache=False)
    expected = model.join_logits(output.logits[0]).float()
    scale = max(1.0, float(expected.abs().max()))
    worst = float((logits - expected).abs().max()) / scale
    tolerance = head_tolerance(model)
    if not worst <= tolerance:
        raise ModelError(
            f"the logits of {model.architecture} differ from its head applied to its base "
            f"model's hidden states by {worst:.1e} of the largest, allowed {tolerance:.0e}. "
            "This architecture cannot be served yet."
        )
    _check_causal(model, ids, hidden.float(), tolerance)
    logger.info("head checked architecture=%s error=%.1e", model.architecture, worst)


def _check_causal(model: TeacherModel, ids: Tensor, hidden: Tensor, tolerance: float) -> None:
    """Raises ModelError if another last token changes the hidden states before it."""
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % model.effective_vocab_size
    before = model.padded_hidden_states([changed])[0][: len(ids) - 1].float()
    moved = float((before - hidden[: len(ids) - 1]).abs().max())
    if not moved <= tolerance * max(1.0, float(hidden.abs().max())):
        raise ModelError(
            f"{model.architecture} is not causal: a row changes with the tokens after it. A "
            "teacher predicts the next token (AutoModelForCausalLM with causal attention)."
        )


@torch.inference_mode()
def can_pack(model: TeacherModel) -> bool:
    """Whether the sequences of a pack have the hidden states that each has alone."""
    lengths = [min(length, model.max_sequence_tokens) for length in PACKED_LENGTHS]
    sequences = [_random_ids(model, length, seed) for seed, length in enumerate(lengths)]
    try:
        worst = _compare_packed(model, sequences)
    except Exception as error:  # what an architecture cannot do shows in any way
        logger.warning(
            "%s cannot run packs (%s): it runs sequences one by one, which is slower",
            model.architecture,
            first_line(error),
        )
        return False
    if worst <= pack_tolerance(model):
        return True
    logger.warning(
        "%s does not keep the sequences of a pack apart (error %.1e): it runs sequences one by "
        "one, which is slower",
        model.architecture,
        worst,
    )
    return False


def _compare_packed(model: TeacherModel, sequences: list[Tensor]) -> float:
    """Returns how far rows of a pack are from the same rows alone, in the sequence where most."""
    no_rows = torch.empty(0, dtype=torch.int64)
    requests = [RowRequest(sequence, no_rows, TopKSpec(k=1)) for sequence in sequences]
    packer = Packer(
        model.device.type,
        pack_tokens=sum(map(len, sequences)),
        divide_at=model.max_shared_positions,
        tiles=PACKED_TILES,
    )
    # Where rounding is coarse it sends some tokens to other experts, but never most.
    may_reroute = model.has_experts and model.dtype != torch.float32
    worst = 0.0
    for pack in packer.pack(requests):
        packed = model.hidden_states(
            pack.token_ids.to(model.device),
            pack.positions.to(model.device),
            pack.cu_seqlens.to(model.device),
            pack,
        ).float()
        for member, start in zip(pack.members, pack.starts, strict=True):
            length = len(sequences[member])
            alone = model.padded_hidden_states([sequences[member]])[0, :length].float()
            differences = packed[start : start + length] - alone
            errors = differences.norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-3)
            if not bool(errors.isfinite().all()):
                return float("inf")
            worst = max(worst, float(errors.median() if may_reroute else errors.max()))
    return worst
