"""Attends within the segments of a pack: causal, and never across a boundary.

Letters: T tokens of a pack, N segments, L tokens of one, H query heads, G key and value heads, each
shared by H / G query heads, D head size; S some of the G, M rows of a product: their queries.

transformers calls a registered attention function with whatever keyword arguments its base model
was called with, so that `cu_seqlens` arrives here without any change to a model. An attention that
is registered without a mask function gets no mask, and none is built.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface

NAME = "logitstream_packed"
"""The name under which transformers knows the attention of this module."""
QUERY_BLOCK = 128
"""Queries that a window or a softcap is applied to at a time: (H, 128, L) scores, never (H, L, L)."""
SCORES_NBYTES = 1 << 20
"""Scores that are computed at a time, of at least one key head: a core's cache should hold them."""
NO_WINDOW = -1


class Rule(NamedTuple):
    """Says how the queries of one layer weigh the keys that are before them."""

    window: int
    """How many tokens a query sees, itself among them; NO_WINDOW for all."""
    softcap: float
    """0 for none."""
    scale: float
    sinks: Tensor | None
    """(H,), a score per head that takes its part of the softmax."""

    @property
    def is_plain(self) -> bool:
        """Whether `scaled_dot_product_attention` has it, but for the window."""
        return self.softcap == 0.0 and self.sinks is None


class KeysPlan(Protocol):
    """Says which keys are kept, and attends to those that were."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Computes (1, T, H, D) for one layer, of the arguments of `attend_on_cpu`."""
        ...


class CannotPack(Exception):
    """Raised when an architecture's attention does not take packs."""


@torch.library.custom_op("logitstream::packed_attention", mutates_args=())
def attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    rest_seqlens: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Computes (1, T, H, D) from (1, H, T, D) queries and (1, G, T, D) keys and values, on a CPU.

    cu_seqlens: (N+1,) int32: where each segment begins, and the end of the last. Tokens after it are
    padding and get zeros. rest_seqlens: the same of what follows in each segment, where the rows of
    one are in two places. window: how many tokens a query sees, itself among them; NO_WINDOW for all.
    softcap: 0 for none. sinks: (H,), a score per head that takes its part of the softmax.

    One operator, so that a compiled graph does not depend on where segments begin. A segment's
    arithmetic depends on its own length alone.
    """
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    rule = Rule(window, softcap, scale, sinks)
    for places in places_of_segments(cu_seqlens, rest_seqlens):
        q, k, v = (take(x, places) for x in (query, key, value))
        put(out, places, attend_in_segment(q, k, v, rule))
    return out


def attend_in_segment(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Computes (1, H, L, D) causally for the last L tokens of a segment, of which all keys are given."""
    is_whole = k.shape[2] == q.shape[2]
    if rule.is_plain and is_whole and not 0 <= rule.window < q.shape[2]:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _attend_in_blocks(q, k, v, rule)


def places_of_segments(cu_seqlens: Tensor, rest_seqlens: Tensor | None) -> Iterator[list[slice]]:
    """Yields where the rows of each segment are that has any."""
    bounds = [cu_seqlens.tolist()] + ([] if rest_seqlens is None else [rest_seqlens.tolist()])
    for pairs in zip(*map(itertools.pairwise, bounds), strict=True):
        if places := [slice(start, stop) for start, stop in pairs if start < stop]:
            yield places


def put(out: Tensor, places: list[slice], attended: Tensor) -> None:
    """Writes (1, H, L, D) of a segment into the places of its rows in (1, T, H, D)."""
    first = 0
    for place in places:
        last = first + place.stop - place.start
        out[:, place] = attended[:, :, first:last].transpose(1, 2)
        first = last


def take(x: Tensor, places: list[slice]) -> Tensor:
    """Takes (1, H, L, D) out of (1, H, T, D); without a copy if the rows are in one place."""
    parts = [x[:, :, place] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@attend_on_cpu.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    rest_seqlens: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Computes (1, H, L, D) for one segment, some queries of some heads at a time.

    Query heads that share a key head are one product. Keys that there are more of than queries stand
    before them.
    """
    window, softcap, scale, sinks = rule
    num_kv_heads, length = k.shape[1], q.shape[2]
    past = k.shape[2] - length
    q_GHLD = q[0].unflatten(0, (num_kv_heads, -1))
    k_GLD, v_GLD = k[0].contiguous(), v[0].contiguous()
    shared = q_GHLD.shape[1]
    out_GHLD = q.new_empty(num_kv_heads, shared, length, v.shape[3])
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        first_key, last_key = past + first, past + last
        begin = max(0, first_key - window + 1) if window >= 0 else 0
        score_nbytes = shared * (last - first) * (last_key - begin) * 4
        step = max(1, SCORES_NBYTES // score_nbytes)
        for head in range(0, num_kv_heads, step):
            some = slice(head, head + step)
            q_SMD = q_GHLD[some, :, first:last].flatten(1, 2)
            scores_SML = torch.baddbmm(
                q_SMD.new_empty(()),
                q_SMD,
                k_GLD[some, begin:last_key].transpose(1, 2),
                beta=0,
                alpha=scale / (softcap or 1.0),
            )
            if softcap:
                scores_SML.tanh_().mul_(softcap)
            scores = scores_SML.unflatten(1, (shared, -1))
            _hide(scores, first_key, last_key, begin, window)
            weights = _softmax(scores, None if sinks is None else sinks.view(-1, shared)[some])
            attended = torch.bmm(weights.to(q.dtype).flatten(1, 2), v_GLD[some, begin:last_key])
            out_GHLD[some, :, first:last] = attended.unflatten(1, (shared, -1))
    return out_GHLD.flatten(0, 1)[None]


def _hide(scores: Tensor, first: int, last: int, begin: int, window: int) -> None:
    """Hides from queries `first` to `last` those of the keys from `begin` on that they do not see."""
    lowest = torch.finfo(scores.dtype).min
    num_queries = last - first
    later = torch.ones(num_queries, num_queries, dtype=torch.bool).triu_(1)
    scores[..., first - begin :].masked_fill_(later, lowest)
    if window >= 0 and last - window > begin:  # the other keys are in every window
        distance = torch.arange(first, last)[:, None] - torch.arange(begin, last - window)
        scores[..., : last - window - begin].masked_fill_(distance >= window, lowest)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Normalises the scores of (S, H) heads in float32; sinks: (S, H), one score more for each."""
    scores = scores.float()
    if sinks is None:
        return torch.softmax(scores, 3)
    column = sinks.float()[:, :, None, None].expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, column], 3), 3)[..., :-1]


def _attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int, scale: float
) -> Tensor:
    """Computes what `attend_on_cpu` does with FlashAttention; without softcap and sinks."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    num_tokens = len(q)
    attended = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        num_tokens,
        num_tokens,
        scale=scale,
        window_size=(-1 if window == NO_WINDOW else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
        num_splits=1,  # a sum that is split depends on how busy the device is
    )
    assert isinstance(attended, Tensor)
    return attended[None]


@functools.cache
def _compiled_flex_attention() -> Any:
    """Returns flex_attention as one kernel; as it is, it makes all (H, T, T) scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


_masks: MutableMapping[Tensor, dict[int, Any]] = WeakTensorKeyDictionary()
"""Of the packs in hand, by their bounds and then by window: making one looks at all pairs of tokens, and
dozens of layers share it."""


def _attend_with_softcap(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    """Computes what `attend_on_cpu` does with flex_attention, on a device; without sinks."""
    mask = _find_mask(cu_seqlens, query.shape[2], window)

    def cap(score: Tensor, *_places: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    attended = _compiled_flex_attention()(
        query,
        key,
        value,
        score_mod=cap,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended.transpose(1, 2)


def _find_mask(cu_seqlens: Tensor, num_tokens: int, window: int) -> Any:
    """Returns the mask of a pack, which is made for the first layer that has this window."""
    if torch.compiler.is_compiling():  # a compiler cannot look into the mapping
        return _make_mask(cu_seqlens, num_tokens, window)
    masks = _masks.setdefault(cu_seqlens, {})
    if window not in masks:
        masks[window] = _make_mask(cu_seqlens, num_tokens, window)
    return masks[window]


def _make_mask(cu_seqlens: Tensor, num_tokens: int, window: int) -> Any:
    """Says which tokens of a pack each of them sees, in blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    at_T = torch.arange(num_tokens, device=cu_seqlens.device)
    segment_T = torch.searchsorted(cu_seqlens, at_T, right=True)

    def may_see(_batch: Tensor, _head: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        seen = (segment_T[q_at] == segment_T[k_at]) & (q_at >= k_at)
        return seen & (q_at - k_at < window) if window >= 0 else seen

    return create_block_mask(may_see, None, None, num_tokens, num_tokens, device=at_T.device)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rest_seqlens: Tensor | None = None,
    keys_plan: KeysPlan | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Computes (1, T, H, D) attention within segments, as transformers calls it.

    rest_seqlens: only on a CPU. keys_plan: attends instead, with keys that were kept.
    Raises CannotPack for a call that is not one of a packed causal language model.
    """
    if cu_seqlens is None and keys_plan is None:
        raise CannotPack("its attention does not pass keyword arguments on")
    if attention_mask is not None or getattr(module, "is_causal", True) is False:
        raise CannotPack("its attention is not plainly causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = NO_WINDOW if sliding_window is None else sliding_window
    if keys_plan is not None:
        rule = Rule(window, softcap or 0.0, scale, s_aux)
        return keys_plan.attend(module.layer_idx, query, key, value, rule), None
    assert cu_seqlens is not None
    if query.device.type == "cpu":
        attended = attend_on_cpu(
            query, key, value, cu_seqlens, rest_seqlens, window, softcap or 0.0, scale, s_aux
        )
    elif s_aux is not None:
        raise CannotPack("attention sinks are not built for this device")
    elif softcap:
        attended = _attend_with_softcap(query, key, value, cu_seqlens, window, softcap, scale)
    else:
        attended = _attend_on_gpu(query, key, value, cu_seqlens, window, scale)
    return attended, None


AttentionInterface.register(NAME, attend)


@contextlib.contextmanager
def packed_attention(causal_lm: Any) -> Iterator[None]:
    """Makes a model attend within segments for as long as the context lasts.

    The model may belong to a caller who generates or trains with it in between.
    """
    config = causal_lm.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
