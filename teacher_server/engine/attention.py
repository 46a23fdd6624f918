"""Attends within the segments of a pack: causal, and never across a boundary.

Letters: T tokens of a pack, N segments, H query heads, G key and value heads, D head size.

transformers calls a registered attention function with whatever keyword arguments its base model
was called with, so that `cu_seqlens` arrives here without any change to a model. An attention that
is registered without a mask function gets no mask, and none is built.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "logitstream_packed"
"""The name under which transformers knows the attention of this module."""
QUERY_BLOCK = 256
"""Queries that a window or a softcap is applied to at a time: (H, 256, L) scores, never (H, L, L)."""
NO_WINDOW = -1


class CannotPack(Exception):
    """Raised when an architecture's attention does not take packs."""


@torch.library.custom_op("logitstream::packed_attention", mutates_args=())
def attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    window: int,
    softcap: float,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Computes (1, T, H, D) from (1, H, T, D) queries and (1, G, T, D) keys and values, on a CPU.

    cu_seqlens: (N+1,) int32: where each segment begins, and the end of the last. Tokens after it are
    padding and get zeros. window: how many tokens a query sees, itself among them; NO_WINDOW for
    all. softcap: 0 for none. sinks: (H,), a score per head that takes its part of the softmax.

    One operator, so that a compiled graph does not depend on where segments begin. A segment's
    arithmetic depends on its own length alone.
    """
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    bounds = cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        is_plain = softcap == 0.0 and sinks is None
        if is_plain and not 0 <= window < stop - start:
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            attended = _attend_in_blocks(q, k, v, window, softcap, scale, sinks)
        out[:, start:stop] = attended.transpose(1, 2)
    return out


@attend_on_cpu.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    window: int,
    softcap: float,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, scale: float, sinks: Tensor | None
) -> Tensor:
    """Computes (1, H, L, D) for one segment, a block of queries at a time."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    blocks = []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        begin = max(0, first - window + 1) if window >= 0 else 0
        at_q = torch.arange(first, last)[:, None]
        at_k = torch.arange(begin, last)
        hidden = at_k > at_q
        if window >= 0:
            hidden |= at_q - at_k >= window
        scores = (q[:, :, first:last] @ k[:, :, begin:last].transpose(2, 3)).mul_(scale)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).float()
        if sinks is None:
            weights = torch.softmax(scores, 3)
        else:
            column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.softmax(torch.cat([scores, column], 3), 3)[..., :-1]
        blocks.append(weights.to(q.dtype) @ v[:, :, begin:last])
    return torch.cat(blocks, 2)


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
    from torch.nn.attention.flex_attention import create_block_mask

    num_tokens = query.shape[2]
    at_T = torch.arange(num_tokens, device=query.device)
    segment_T = torch.searchsorted(cu_seqlens, at_T, right=True)

    def may_see(_batch: Tensor, _head: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        seen = (segment_T[q_at] == segment_T[k_at]) & (q_at >= k_at)
        return seen & (q_at - k_at < window) if window >= 0 else seen

    def cap(score: Tensor, *_places: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    mask = create_block_mask(may_see, None, None, num_tokens, num_tokens, device=query.device)
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
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Computes (1, T, H, D) attention within segments, as transformers calls it.

    Raises CannotPack for a call that is not one of a packed causal language model.
    """
    if cu_seqlens is None:
        raise CannotPack("its attention does not pass keyword arguments on")
    if attention_mask is not None or getattr(module, "is_causal", True) is False:
        raise CannotPack("its attention is not plainly causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = NO_WINDOW if sliding_window is None else sliding_window
    if query.device.type == "cpu":
        attended = attend_on_cpu(
            query, key, value, cu_seqlens, window, softcap or 0.0, scale, s_aux
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
