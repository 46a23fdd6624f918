"""Joins what several teachers say of the rows of a batch, and mixes what they say of the same rows.

The mixture of teachers j with weights w_j is p(id) = sum_j w_j p_j(id), each p_j at the temperature of
the targets. What the targets of each kind tell of it:

- dense, hidden, realized and given_ids: it itself, because every teacher tells p_j of the same ids.
- top_k: the ids that any teacher kept. Where a teacher did not keep an id, its p_j counts as 0 there and
  in the tail instead. p of a kept id is thus too low by at most the sum over those teachers of
  w_j * min(smallest p_j that is kept, tail_j), and the tail is too large by what all of them lack.

Letters: R rows, E entries of all rows, J teachers, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logit_codec import (
    DenseTargets,
    FeaturesTargets,
    GivenIdsTargets,
    HiddenTargets,
    MixedHiddenTargets,
    RealizedTargets,
    Targets,
    TargetSpec,
    TopKTargets,
)
from logit_codec.kinds import kind_named
from logit_codec.kinds.mixed_hidden import HeadShare
from logit_codec.kinds.tail import TailTargets
from logit_codec.targets import row_splits_of
from student_trainer.errors import InvalidRequest

MIXABLE = ("dense", "hidden", "given_ids", "top_k", "realized")
"""The kinds of target of which a mixture can be made."""


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """Holds what one teacher, or each of several, says of the rows of one sequence."""

    targets: Mapping[str, Targets]
    """By the teacher's name; all have the same rows."""
    weights: Mapping[str, float]
    """By the teacher's name; they add up to 1."""


def check_mixable(spec: TargetSpec) -> None:
    """Raises InvalidRequest for targets of which no mixture can be made."""
    if spec.kind not in MIXABLE:
        raise InvalidRequest(
            f"several teachers cannot be mixed on one row with targets={str(spec)!r}: ask for "
            f"{', '.join(MIXABLE)}. Or let each row have one teacher, drawn with these weights as "
            "probabilities: the expected forward KL has the same gradient."
        )
    if getattr(spec, "ranks", False):
        raise InvalidRequest("a mixture of teachers has no ranks: leave ranks=1 out of given_ids")


def join(said: Sequence[Said]) -> Targets:
    """Joins the rows of all sequences of a batch, one after another.

    Where one teacher alone is asked for each row, its targets come out as they are. A mixture has no
    log_z and no entropy, so that beside one no row has them.
    """
    if isinstance(next(iter(said[0].targets.values())), HiddenTargets):
        return _join_hidden(said)
    parts = [_mix(one) for one in said]
    if isinstance(parts[0], FeaturesTargets):
        _check_features(parts)
    return Targets.cat(_keep_common(parts))


def _mix(said: Said) -> Targets:
    """Returns the targets of one teacher, or of the mixture."""
    parts = list(said.targets.values())
    if len(parts) == 1:
        return parts[0]
    log_weights = [math.log(said.weights[name]) for name in said.targets]
    common = {"entropy": None, "log_z": None, "realized_logprob": _mix_realized(parts, log_weights)}
    first = parts[0]
    if isinstance(first, DenseTargets):
        logprobs_RV = first.logprobs.new_full(first.logprobs.shape, -torch.inf, dtype=torch.float32)
        for part, log_weight in zip(parts, log_weights, strict=True):
            assert isinstance(part, DenseTargets)
            logprobs_RV = torch.logaddexp(logprobs_RV, part.logprobs.float() + log_weight)
        return replace(first, logprobs=logprobs_RV.to(first.logprobs.dtype), **common)
    if isinstance(first, RealizedTargets):
        return replace(first, **common)
    assert isinstance(first, TopKTargets | GivenIdsTargets)
    return _mix_kept(parts, log_weights, common)  # type: ignore[arg-type]


def _mix_realized(parts: Sequence[Targets], log_weights: Sequence[float]) -> Tensor | None:
    """Returns (R,) logprobs of the mixture; None unless all teachers tell theirs."""
    known = [
        part.realized_logprob + log_weight
        for part, log_weight in zip(parts, log_weights, strict=True)
        if part.realized_logprob is not None
    ]
    return torch.stack(known).logsumexp(0) if len(known) == len(parts) else None


def _mix_kept(
    parts: Sequence[TailTargets], log_weights: Sequence[float], common: Mapping[str, Tensor | None]
) -> TailTargets:
    """Adds up the kept entries of all teachers by row and id, and what each has left for its tail."""
    first, num_rows = parts[0], parts[0].num_rows
    # One number for row and id: equal ones are the same entry, and ascending is the order wanted.
    keys = torch.cat([part.entry_rows() * first.vocab_size + part.token_ids for part in parts])
    weighted = zip(parts, log_weights, strict=True)
    mass = torch.cat([(part.logprobs + log_weight).double().exp() for part, log_weight in weighted])
    keys_E, entry_of = keys.unique(return_inverse=True)
    mass_E = torch.zeros(len(keys_E), dtype=torch.float64).index_add_(0, entry_of, mass)
    weighted = zip(parts, log_weights, strict=True)
    tails_JR = torch.stack([part.tail_logprob + log_weight for part, log_weight in weighted])
    sizes_R = torch.bincount(keys_E // first.vocab_size, minlength=num_rows)
    return replace(
        first,
        row_splits=row_splits_of(sizes_R),
        token_ids=keys_E % first.vocab_size,
        logprobs=mass_E.log().float(),
        tail_logprob=tails_JR.logsumexp(0).clamp(max=0.0),
        **common,
    )


def _join_hidden(said: Sequence[Said]) -> Targets:
    """Joins states by their heads; the heads' softmaxes are mixed when a loss reads them."""
    heads = {
        part.head_fingerprint
        for one in said
        for part in one.targets.values()
        if isinstance(part, HiddenTargets)
    }
    if len(heads) == 1 and all(len(one.targets) == 1 for one in said):
        return Targets.cat([part for one in said for part in one.targets.values()])
    counts = [next(iter(one.targets.values())).num_rows for one in said]
    ends = torch.tensor(counts).cumsum(0).tolist()
    parts: dict[tuple[str, bool], list[HiddenTargets]] = {}
    rows: dict[tuple[str, bool], list[Tensor]] = {}
    weights: dict[tuple[str, bool], list[Tensor]] = {}
    for one, count, end in zip(said, counts, ends, strict=True):
        for name, part in one.targets.items():
            assert isinstance(part, HiddenTargets)
            # Two teachers of a mixture may have one head: their states are still two.
            key = name, len(one.targets) > 1
            parts.setdefault(key, []).append(_bare(part))
            rows.setdefault(key, []).append(torch.arange(end - count, end))
            log_weight = torch.full((count,), math.log(one.weights[name]))
            weights.setdefault(key, []).append(log_weight)
    shares = []
    for key, some in parts.items():
        joined = Targets.cat(some)
        assert isinstance(joined, HiddenTargets)
        more = {"log_weights": torch.cat(weights[key])} if key[1] else {}
        shares.append(HeadShare.of(joined, torch.cat(rows[key]), sum(counts), **more))
    first = next(iter(said[0].targets.values()))
    return MixedHiddenTargets(
        vocab_size=first.vocab_size,
        temperature=first.temperature,
        shares=tuple(shares),
        **_join_row_fields(said),
    )


def _bare(part: HiddenTargets) -> HiddenTargets:
    """Returns states without the numbers of their rows, which the rows of the batch have."""
    return replace(part, **dict.fromkeys(Targets.row_fields))


def _join_row_fields(said: Sequence[Said]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor | None]] = {name: [] for name in Targets.row_fields}
    for one in said:
        parts = list(one.targets.values())
        log_weights = [math.log(one.weights[name]) for name in one.targets]
        alone = parts[0] if len(parts) == 1 else None
        for name in Targets.row_fields:
            value = None if alone is None else getattr(alone, name)
            if alone is None and name == "realized_logprob":
                value = _mix_realized(parts, log_weights)
            found[name].append(value)
    return {
        name: torch.cat(values)  # type: ignore[arg-type]
        for name, values in found.items()
        if all(value is not None for value in values)
    }


def _keep_common(parts: Sequence[Targets]) -> list[Targets]:
    """Leaves out what is not known of all rows."""
    missing = {
        name: None
        for name in Targets.row_fields
        if any(getattr(one, name) is None for one in parts)
    }
    return [replace(part, **missing) for part in parts] if missing else list(parts)


def _check_features(parts: Sequence[Targets]) -> None:
    """Raises InvalidRequest for states of different size, which no tensor holds side by side."""
    sizes = {part.hidden.shape[2] for part in parts if isinstance(part, FeaturesTargets)}
    if len(sizes) > 1:
        raise InvalidRequest(
            f"a batch has features of {' and '.join(map(str, sorted(sizes)))} numbers: its rows are of "
            "teachers of different hidden sizes. Put rows of one teacher into a batch."
        )


def narrow(targets: Targets, width: int) -> Targets:
    """Conditions targets on an id below `width`, from which on the teacher's head is padding."""
    if targets.vocab_size == width:
        return targets
    cells = kind_named(targets.kind).cells
    if cells is None:
        return replace(targets, vocab_size=width)
    return cells(targets).within(width)[0]
