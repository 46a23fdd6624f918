"""Draws the next token of each text, so that its choice depends on the text alone.

The draw is Gumbel-max (Gumbel, 1954; Maddison et al., 2014, section 2): argmax of logit + noise is a
sample of the softmax. Against rounding it is stable: a logit that changes in its last bits rarely
changes the argmax, where a uniform number against cumulated probabilities often falls on the other
side. To make noise for 256,000 ids would take longer than a small model's step. So a block of ids is
drawn first, by the log-sum-exp of its logits, and then an id in it: together that is the same
distribution, with noise for V / 512 + 512 numbers.

The noise is a counter-based hash, SplitMix64 as in logit_codec/sampling.py, of the seed, the epoch,
the prompt's ids, the number of the sample and the token's place in the sequence: the same in any pack,
on any replica.

Letters: R rows, V ids, N blocks, W ids of a block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from logit_codec.sampling import hash_counters, shift_right
from teacher_server.engine.continuation import Continuation

BLOCK = 512
"""W: ids of a block."""
IN_BLOCK = 1 << 32
"""Counters of the second draw begin here,"""
OF_TARGETS = 2 << 32
"""and the one that targets of kind sampled are drawn with."""


def draw(logits_RV: Tensor, texts: Sequence[Continuation], keys_R: Tensor) -> Tensor:
    """Draws (R,) int64 ids, one for each text; rows beyond the texts get their likeliest id.

    keys_R: what `keys_of` makes of the texts.
    logits_RV: ids with -inf are never drawn. Equally likely ids: temperature 0 takes the lowest.
    """
    likeliest_R = logits_RV.argmax(1)
    rows = [row for row, text in enumerate(texts) if text.rule.temperature > 0]
    if not rows:
        return likeliest_R
    device = logits_RV.device
    some = [texts[row] for row in rows]
    index_R = torch.tensor(rows, device=device)
    temperatures_R = torch.tensor([text.rule.temperature for text in some], device=device)
    scaled_RV = logits_RV.index_select(0, index_R).float() / temperatures_R[:, None]
    _cut(scaled_RV, some)
    if len(rows) < len(texts):
        keys_R = keys_R[rows]
    return likeliest_R.index_copy(0, index_R, _draw_in_two_steps(scaled_RV, keys_R.to(device)))


def uniforms_of(keys_R: Tensor) -> Tensor:
    """Makes (R,) float64 in [0, 1): what the targets of the texts' next tokens are drawn with."""
    words_R = hash_counters(keys_R, torch.tensor(OF_TARGETS))
    return shift_right(words_R, 11).double() * 2.0**-53


def keys_of(texts: Sequence[Continuation]) -> Tensor:
    """Makes (R,) int64 keys of the noise for the next token of each text, on the CPU."""
    keys_R = torch.tensor([text.draw_key for text in texts])
    return hash_counters(keys_R, torch.tensor([text.num_tokens for text in texts]))


def _draw_in_two_steps(scaled_RV: Tensor, keys_R: Tensor) -> Tensor:
    """Draws (R,) ids from softmax(scaled_RV): a block, and an id of it."""
    num_rows, vocab_size = scaled_RV.shape
    padded = F.pad(scaled_RV, (0, -vocab_size % BLOCK), value=-torch.inf)
    blocks_RNW = padded.view(num_rows, -1, BLOCK)
    masses_RN = blocks_RNW.logsumexp(2)
    at_N = torch.arange(masses_RN.shape[1], device=scaled_RV.device)
    block_R = (masses_RN.double() + _make_noise(keys_R[:, None], at_N)).argmax(1)
    chosen_RW = blocks_RNW[torch.arange(num_rows, device=scaled_RV.device), block_R]
    ids_RW = block_R[:, None] * BLOCK + torch.arange(BLOCK, device=scaled_RV.device)
    noise_RW = _make_noise(keys_R[:, None], ids_RW + IN_BLOCK)
    place_R = (chosen_RW.double() + noise_RW).argmax(1)
    return block_R * BLOCK + place_R


def _make_noise(keys: Tensor, counters: Tensor) -> Tensor:
    """Makes standard Gumbel noise, float64, from 53 bits of a hash each."""
    uniform = (shift_right(hash_counters(keys, counters), 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _cut(scaled_RV: Tensor, texts: Sequence[Continuation]) -> None:
    """Sets ids to -inf that the rules do not draw from: first beyond top_k, then beyond top_p.

    Ids that are as likely as the last one that is kept are kept too.
    """
    vocab_size = scaled_RV.shape[1]
    most = [min(text.rule.top_k or vocab_size, vocab_size) for text in texts]
    limited = [row for row, count in enumerate(most) if count < vocab_size]
    if limited:
        rows = torch.tensor(limited, device=scaled_RV.device)
        counts = torch.tensor([most[row] for row in limited], device=scaled_RV.device)
        some = scaled_RV.index_select(0, rows)
        largest = some.topk(max(most[row] for row in limited), dim=1).values
        lowest = largest.gather(1, counts[:, None] - 1)
        scaled_RV.index_copy_(0, rows, some.masked_fill(some < lowest, -torch.inf))
    limited = [row for row, text in enumerate(texts) if text.rule.top_p < 1]
    if limited:
        rows = torch.tensor(limited, device=scaled_RV.device)
        masses = torch.tensor([texts[row].rule.top_p for row in limited], device=scaled_RV.device)
        some = scaled_RV.index_select(0, rows)
        descending = some.sort(1, descending=True).values
        probabilities = descending.softmax(1)
        before = probabilities.cumsum(1) - probabilities
        # The likeliest id is always kept; each other as long as those before it lack mass.
        kept = (before < masses[:, None]).sum(1, keepdim=True).clamp(min=1)
        lowest = descending.gather(1, kept - 1)
        scaled_RV.index_copy_(0, rows, some.masked_fill(some < lowest, -torch.inf))
