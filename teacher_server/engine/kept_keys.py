"""Attends to keys that are kept in pages, for texts that are being written.

Letters: T rows of a launch, R rows of one group, H query heads, G key heads, each shared by Q = H / G
query heads, D head size, L keys that are read, P pages of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_server.engine.attention import (
    NO_WINDOW,
    Rule,
    attend_in_segment,
    places_of_segments,
    put,
    take,
)
from teacher_server.engine.key_pool import PAGE_TOKENS, KeyPool, KeyShape


class ShapeFinder:
    """Finds out what every layer keeps of a token, while a model runs on a few."""

    def __init__(self) -> None:
        self.shapes: dict[int, KeyShape] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        self.shapes[layer] = KeyShape(key.shape[1], key.shape[3], value.shape[3])
        attended = attend_in_segment(query, key, value, rule)
        return attended.transpose(1, 2)


class ChunkPlan:
    """Keeps the keys of chunks of prompts, each of which attends to its own text's tokens so far."""

    def __init__(
        self,
        pool: KeyPool,
        cu_seqlens: Tensor,
        rest_seqlens: Tensor | None,
        slots: Sequence[Tensor],
        pages_before: Sequence[Tensor],
        begun: Sequence[Tensor],
    ) -> None:
        """slots: of each segment, where its rows are kept. pages_before: the pages of what is before,
        which fills them. begun: as for `KeyPool.write`."""
        self._pool = pool
        self._places = list(places_of_segments(cu_seqlens, rest_seqlens))
        self._slots = slots
        self._pages_before = pages_before
        self._begun = begun

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        segments = zip(
            self._places, self._slots, self._pages_before, self._begun, strict=False
        )  # what is left over is padding
        for places, slots, pages, begun in segments:
            q, k, v = (take(x, places) for x in (query, key, value))
            self._pool.write(layer, slots, k[0].transpose(0, 1), v[0].transpose(0, 1), begun)
            if len(pages):
                k = torch.cat([self._read(self._pool.keys[layer], pages), k], 2)
                v = torch.cat([self._read(self._pool.values[layer], pages), v], 2)
            put(out, places, attend_in_segment(q, k, v, rule))
        return out

    @staticmethod
    def _read(kept: Tensor, pages: Tensor) -> Tensor:
        """Returns (1, G, L, D) of whole pages."""
        return kept.index_select(0, pages).flatten(0, 1).transpose(0, 1)[None]


class Row(NamedTuple):
    """Names a token that attends as a single query."""

    pages: Sequence[int]
    """Of its text."""
    position: int


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Holds rows that read equally many pages, so that one call attends for all of them."""

    rows: Tensor | slice
    """(R,) their places in the launch."""
    pages: Tensor
    """(R * P,)."""
    num_rows: int
    seen: Tensor
    """(R, 1, 1, L) bool: keys of these pages that a row sees."""


class RowPlan:
    """Keeps the keys of single tokens, each of which attends to its own text's tokens up to it.

    How many keys are read depends on a row's position alone: whole pages. So its bits do not depend
    on the rows beside it.
    """

    def __init__(self, pool: KeyPool, rows: Sequence[Row], device: torch.device) -> None:
        """rows: those of the launch from its first row on; the others are padding."""
        self._pool = pool
        self._rows = rows
        self._device = device
        slots = [
            row.pages[row.position // PAGE_TOKENS] * PAGE_TOKENS + row.position % PAGE_TOKENS
            for row in rows
        ]
        self._slots = torch.tensor(slots, device=device)
        begun = [slot // PAGE_TOKENS for slot in slots if slot % PAGE_TOKENS == 0]
        self._begun = torch.tensor(begun, dtype=torch.int64, device=device)
        self._groups: dict[int, list[_Group]] = {}
        """By window: what the layers of one window share."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        count, num_kv_heads = len(self._rows), key.shape[1]
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        self._pool.write(layer, self._slots, keys[:count], values[:count], self._begun)
        q_TGQD = query[0].transpose(0, 1).unflatten(1, (num_kv_heads, -1))
        out_TGQD = query.new_zeros(*q_TGQD.shape[:3], value.shape[3])
        for group in self._group(rule.window):
            k, v = (
                kept[layer]
                .index_select(0, group.pages)
                .view(group.num_rows, -1, *kept[layer].shape[2:])
                for kept in (self._pool.keys, self._pool.values)
            )
            q_RGQD = q_TGQD[group.rows]
            k_RGLD, v_RGLD = k.transpose(1, 2), v.transpose(1, 2)
            if rule.is_plain:
                # Of one query alone torch may divide the keys among its threads, and adds up otherwise
                # the more rows there are; of two it does not.
                is_single = q_RGQD.shape[2] == 1
                attended = F.scaled_dot_product_attention(
                    q_RGQD.expand(-1, -1, 2, -1) if is_single else q_RGQD,
                    k_RGLD,
                    v_RGLD,
                    attn_mask=group.seen,
                    scale=rule.scale,
                )[:, :, : q_RGQD.shape[2]]
            else:
                attended = _attend(q_RGQD, k_RGLD, v_RGLD, ~group.seen, rule)
            out_TGQD[group.rows] = attended
        return out_TGQD.flatten(1, 2)[None]

    def _group(self, window: int) -> list[_Group]:
        """Groups the rows by how many pages they read within a window."""
        if window not in self._groups:
            by_count: dict[int, list[tuple[int, int, int]]] = {}
            for at, row in enumerate(self._rows):
                first = 0 if window == NO_WINDOW else max(0, row.position - window + 1)
                first_page, last_page = first // PAGE_TOKENS, row.position // PAGE_TOKENS
                by_count.setdefault(last_page - first_page + 1, []).append((at, first_page, first))
            self._groups[window] = [
                self._make_group(count, members) for count, members in by_count.items()
            ]
        return self._groups[window]

    def _make_group(self, count: int, members: Sequence[tuple[int, int, int]]) -> _Group:
        pages = [
            page
            for at, first_page, _ in members
            for page in self._rows[at].pages[first_page : first_page + count]
        ]
        starts = torch.tensor([first_page * PAGE_TOKENS for _, first_page, _ in members])
        positions_RL = starts[:, None] + torch.arange(count * PAGE_TOKENS)
        first_R = torch.tensor([first for _, _, first in members])
        last_R = torch.tensor([self._rows[at].position for at, _, _ in members])
        seen_RL = (positions_RL >= first_R[:, None]) & (positions_RL <= last_R[:, None])
        at = [at for at, _, _ in members]
        is_run = at == list(range(at[0], at[-1] + 1))
        return _Group(
            slice(at[0], at[-1] + 1) if is_run else torch.tensor(at, device=self._device),
            torch.tensor(pages, device=self._device),
            len(members),
            seen_RL[:, None, None].to(self._device),
        )


def _attend(q_RGQD: Tensor, k_RGLD: Tensor, v_RGLD: Tensor, hidden: Tensor, rule: Rule) -> Tensor:
    """Computes (R, G, Q, D) with a softcap or sinks."""
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q_RGQD, k_RGLD, v_RGLD))
    scores = torch.bmm(flat_q, flat_k.transpose(1, 2)).view(*q_RGQD.shape[:3], -1) * rule.scale
    if rule.softcap:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).float()
    if rule.sinks is None:
        weights = torch.softmax(scores, 3)
    else:
        column = rule.sinks.float().view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, column], 3), 3)[..., :-1]
    attended = torch.bmm(weights.to(q_RGQD.dtype).flatten(0, 1), flat_v)
    return attended.view(*q_RGQD.shape[:3], -1)
