"""Writes texts: keeps the keys of prompts, and draws one token after another.

All tokens of a prompt but the last are computed in chunks, as sequences are that are scored. The last
one, and every token that is drawn, is a row of a launch of DECODE_ROWS rows, or of fewer where products
of fewer rows round alike (packed_weights.py), filled up with padding: so its bits depend neither on the
texts beside it nor on their number. A text that goes on elsewhere, or
whose pages were taken away, computes its prompt in chunks again and the tokens after it as such rows
again, several at once, and goes on as if nothing had happened.

Letters: R rows of a launch, D hidden size, V vocabulary, T tokens of a pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logit_codec import TargetSpec, select_rows
from teacher_server.engine.attention import KeysPlan, packed_attention
from teacher_server.engine.batch import PackTimes
from teacher_server.engine.continuation import Continuation
from teacher_server.engine.device import Device, Event
from teacher_server.engine.drawing import BLOCK as DRAWN_BLOCK
from teacher_server.engine.drawing import draw, keys_of, uniforms_of
from teacher_server.engine.head import ScoredRows, States
from teacher_server.engine.kept_keys import ChunkPlan, Row, RowPlan, ShapeFinder
from teacher_server.engine.key_pool import PAGE_TOKENS, KeyPool, KeyShape, page_nbytes, slots_of
from teacher_server.engine.layers import watch_layers
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.orders import (
    CopyPage,
    Followers,
    TextReporter,
    WriteChunks,
    WriteStep,
)
from teacher_server.engine.packed_weights import PackedProducts, can_order
from teacher_server.engine.packing import ROW_MULTIPLE
from teacher_server.engine.products import TiledProducts, Tiling

DECODE_ROWS = {"cpu": 8, "cuda": 64}
"""Rows of a launch that draws tokens. On a CPU a product of 8 rows takes little longer than one of a
single row, because it waits for the weights, and all 8 round alike (docs/log.md)."""
CHUNK_TOKENS = 512
"""Tokens of a prompt that are computed at once, a whole number of pages."""


def describe_shape(device_type: str) -> dict[str, Any]:
    """Returns the sizes that the bytes of a text depend on."""
    return {
        "decode_rows": DECODE_ROWS.get(device_type, DECODE_ROWS["cuda"]),
        "chunk_tokens": CHUNK_TOKENS,
        "page_tokens": PAGE_TOKENS,
        "drawn_block": DRAWN_BLOCK,
        "ordered_weights": can_order(device_type),
    }


class CannotGenerate(Exception):
    """Raised for a teacher that scores, and cannot write: says why."""


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedChunks:
    """Holds parts of prompts that the device was given."""

    chunks: tuple[tuple[Continuation, int], ...]
    events: tuple[Event, Event]


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedStep:
    """Holds rows that the device was given, one for each text."""

    texts: tuple[Continuation, ...]
    token_ids: tuple[Tensor, ...]
    """Of each launch, (R,) int64; not to be read before the last event."""
    rows: tuple[ScoredRows | None, ...]
    """In the order of the texts; None for one without targets."""
    events: tuple[Event, Event, Event, Event]
    """The start, and the ends of the base model's work, of the head's, and of the copies."""


class Generator:
    """Runs the texts of one engine; whoever calls it decides which of them, and when.

    Nothing here waits for a GPU but `result_of_chunks` and `result_of_step`. Not thread-safe: one thread
    launches, and another may take results.
    """

    def __init__(
        self,
        model: TeacherModel,
        device: Device,
        pool_nbytes: int,
        *,
        exact: bool = True,
        followers: Followers | None = None,
    ) -> None:
        """Raises CannotGenerate, and ValueError if the pool holds no page.

        followers: ranks that are told of every launch before it begins.
        """
        self._model = model
        self._followers = followers
        self._reporter = TextReporter()
        self._device = device
        self._exact = exact
        shapes = find_key_shapes(model)
        self.pool = KeyPool(shapes, model.dtype, model.device, pool_nbytes)
        self.decode_rows = DECODE_ROWS.get(model.device.type, DECODE_ROWS["cuda"])
        self._products = PackedProducts(model.causal_lm, self.decode_rows)
        self.max_tokens = min(longest_text(model), self.pool.max_tokens)
        """Most tokens of a text, its prompt included."""

    def next_chunk(self, text: Continuation) -> int:
        """Returns how many tokens come next before a token can be drawn; 0 if it can be now."""
        at, last = text.num_cached, text.num_tokens - 1
        prefilled = len(text.prompt_ids) - 1
        if at < prefilled:  # the cuts depend on the place in the text alone
            return min(prefilled, at - at % CHUNK_TOKENS + CHUNK_TOKENS) - at
        return min(last - at, CHUNK_TOKENS)

    def launch_chunks(self, chunks: Sequence[tuple[Continuation, int]]) -> LaunchedChunks:
        """Queues the computation of the next tokens of some texts, as many as `next_chunk` said.

        Their pages must be there. No text may be in two launches that are in flight.
        """
        if self._followers is not None:
            news = self._reporter.report([text for text, _ in chunks])
            counts = tuple(count for _, count in chunks)
            self._followers.tell(WriteChunks(news, counts, self._reporter.take_gone()))
        start = self._device.mark()
        prompts = [(text, count) for text, count in chunks if _is_prompt(text)]
        if prompts:
            self._run_prompts(prompts)
        rows = [
            (text, at)
            for text, count in chunks
            if not _is_prompt(text)
            for at in range(text.num_cached, text.num_cached + count)
        ]
        step = self.decode_rows
        for first in range(0, len(rows), step):
            self._run_rows(rows[first : first + step])
        return LaunchedChunks(tuple(chunks), (start, self._device.mark()))

    def copy_page(self, source: int, target: int) -> None:
        """Makes a page hold what another one holds, so that two texts go on differently in it."""
        if self._followers is not None:
            self._followers.tell(CopyPage(source, target))
        self.pool.copy(source, target)

    def result_of_chunks(self, launched: LaunchedChunks) -> PackTimes:
        """Waits for the device, and counts the tokens as cached. Raises the device's error."""
        start, done = launched.events
        done.synchronize()
        for text, count in launched.chunks:
            text.num_cached += count
        return PackTimes(0.0, 0.0, 0.0, self._device.seconds_between(start, done), 0.0, 0.0)

    def launch_step(self, texts: Sequence[Continuation]) -> LaunchedStep:
        """Queues one token for each text: each must be ready, with a page for its last token."""
        if self._followers is not None:
            news = self._reporter.report(texts)
            self._followers.tell(WriteStep(news, self._reporter.take_gone()))
        start = self._device.mark()
        ids: list[Tensor] = []
        rows: list[ScoredRows | None] = []
        states = []
        size = self.decode_rows if self._exact else max(len(texts), self.decode_rows)
        for first in range(0, len(texts), size):
            some = texts[first : first + size]
            layers = sorted({n for text in some if text.spec for n in text.spec.feature_layers})
            states.append(
                (some, self._run_rows([(text, text.num_cached) for text in some], layers))
            )
        forwarded = self._device.mark()
        found = [self._draw(some, state) for some, state in states]
        selected = self._device.mark()
        for drawn, kept in found:
            ids.append(drawn.to("cpu", non_blocking=True))
            rows += kept
        return LaunchedStep(
            tuple(texts), tuple(ids), tuple(rows), (start, forwarded, selected, self._device.mark())
        )

    def result_of_step(
        self, launched: LaunchedStep
    ) -> tuple[list[int], tuple[ScoredRows | None, ...], PackTimes]:
        """Waits for the device; returns the id that was drawn for each text, and its targets.

        The caller appends the ids to the texts. Raises the device's error.
        """
        start, forwarded, selected, done = launched.events
        done.synchronize()
        between = self._device.seconds_between
        times = PackTimes(
            fill_s=0.0,
            launch_s=0.0,
            wait_s=0.0,
            forward_s=between(start, forwarded),
            head_s=between(forwarded, selected),
            copy_s=between(selected, done),
        )
        drawn = [token_id for ids in launched.token_ids for token_id in ids.tolist()]
        for text in launched.texts:
            text.num_cached += 1
        return drawn, launched.rows, times

    @torch.inference_mode()
    def _run_prompts(self, chunks: Sequence[tuple[Continuation, int]]) -> None:
        """Runs chunks of prompts in one pack, and keeps their keys."""
        lengths = [count for _, count in chunks]
        padding = -sum(lengths) % ROW_MULTIPLE
        zeros = torch.zeros(padding, dtype=torch.int64)
        spans = [(text, text.num_cached, text.num_cached + count) for text, count in chunks]
        token_ids = torch.cat([*(text.prompt_ids[a:b] for text, a, b in spans), zeros])
        positions = torch.cat([*(torch.arange(a, b) for _, a, b in spans), zeros])
        upload = self._device.upload
        begun = [
            torch.tensor(
                [text.pages[b // PAGE_TOKENS]] if b % PAGE_TOKENS else [], dtype=torch.int64
            )
            for text, _, b in spans
        ]
        kept = (
            [upload(slots_of(text.pages, a, b)) for text, a, b in spans],
            [upload(torch.tensor(text.pages[: a // PAGE_TOKENS])) for text, a, _ in spans],
            [upload(one) for one in begun],
        )
        if self._exact and self._model.device.type == "cpu":
            tiling = Tiling.of([*lengths, padding])
            plan = ChunkPlan(self.pool, tiling.large_seqlens, tiling.small_seqlens, *kept)
            with TiledProducts(tiling):
                run_model(self._model, tiling.to_tiles(token_ids), tiling.to_tiles(positions), plan)
            return
        ends = torch.tensor([0, *lengths]).cumsum(0)
        plan = ChunkPlan(self.pool, ends, None, *kept)
        run_model(self._model, upload(token_ids), upload(positions), plan)

    def release_weights(self) -> None:
        """Drops what was made of the weights to write texts; the next launch makes it again."""
        self._products.release()

    def _num_rows_for(self, count: int) -> int:
        """Returns how many rows a launch of `count` has, filled up; all such numbers round alike."""
        return next((size for size in self._products.sizes if size >= count), self.decode_rows)

    @torch.inference_mode()
    def _run_rows(
        self, rows: Sequence[tuple[Continuation, int]], layers: Sequence[int] = ()
    ) -> States:
        """Runs single tokens, each at its place in its text, in one launch that is filled up."""
        padding = max(self._num_rows_for(len(rows)) - len(rows), 0)
        token_ids = torch.tensor([*(_token(text, at) for text, at in rows), *[0] * padding])
        positions = torch.tensor([*(at for _, at in rows), *[0] * padding])
        plan = RowPlan(self.pool, [Row(text.pages, at) for text, at in rows], self._model.device)
        upload = self._device.upload
        with watch_layers(self._model.causal_lm, layers) as by_layer, self._products.use():
            hidden_RD = run_model(self._model, upload(token_ids), upload(positions), plan)
        return States(hidden_RD, by_layer)

    @torch.inference_mode()
    def _draw(
        self, texts: Sequence[Continuation], states: States
    ) -> tuple[Tensor, list[ScoredRows | None]]:
        """Draws the next tokens of texts and selects their targets from the same logits."""
        hidden_RD = states.hidden_TD
        with self._products.use():
            logits_RV = self._model.logits(hidden_RD)
        logits_RV[:, self._model.effective_vocab_size :] = -torch.inf
        keys_R = keys_of(texts)
        drawn_R = draw(logits_RV, texts, keys_R)
        rows: list[ScoredRows | None] = [None] * len(texts)
        groups: dict[tuple[TargetSpec, float], list[int]] = {}
        for row, text in enumerate(texts):
            if text.spec is not None:
                groups.setdefault((text.spec, text.target_temperature), []).append(row)
        index = torch.arange(len(hidden_RD), device=hidden_RD.device)
        for (spec, temperature), members in groups.items():
            # All rows each time: what a selection computes of a row might depend on their number.
            inputs: dict[str, Any] = {"realized_ids": drawn_R}
            if spec.needs_uniforms:
                uniforms = torch.zeros(len(hidden_RD), dtype=torch.float64)
                uniforms[: len(texts)] = uniforms_of(keys_R)
                inputs["uniforms"] = self._device.upload(uniforms)
            if spec.needs_hidden:
                inputs["hidden"] = hidden_RD
            if spec.feature_layers:
                inputs["features"] = states.features(spec.feature_layers, index)
            selection = select_rows(logits_RV, spec, temperature=temperature, **inputs)
            selection = self._device.download(selection)
            for row in members:
                rows[row] = ScoredRows(((selection, slice(row, row + 1)),))
        return drawn_R[: len(texts)], rows


def run_model(model: TeacherModel, token_ids: Tensor, positions: Tensor, plan: KeysPlan) -> Tensor:
    """Runs tokens at their positions -> (T, D) hidden states; attention goes by the plan."""
    with packed_attention(model.causal_lm):
        output = model.causal_lm.base_model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            keys_plan=plan,
        )
    return output.last_hidden_state[0]


def longest_text(model: TeacherModel) -> int:
    """Returns how many tokens a text may have, if there is memory for their keys."""
    if model.max_shared_positions is None:
        return model.max_sequence_tokens
    # Rows of one launch share the frequencies of RoPE, which change there.
    return min(model.max_sequence_tokens, model.max_shared_positions)


def find_max_tokens(model: TeacherModel, pool_nbytes: int) -> int:
    """Returns how many tokens a text may have with a pool of this size, without making it.

    Raises CannotGenerate.
    """
    pages = pool_nbytes // page_nbytes(find_key_shapes(model), model.dtype)
    return min(longest_text(model), pages * PAGE_TOKENS)


@torch.inference_mode()
def find_key_shapes(model: TeacherModel) -> list[KeyShape]:
    """Finds what each layer keeps of a token. Raises CannotGenerate."""
    if not model.is_packed:
        raise CannotGenerate(
            f"{model.architecture} does not keep the sequences of a pack apart, which writing texts "
            "needs"
        )
    finder = ShapeFinder()
    device = model.device
    run_model(
        model,
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.arange(2, device=device),
        finder,
    )
    count = model.causal_lm.config.get_text_config().num_hidden_layers
    if sorted(finder.shapes) != list(range(count)):
        raise CannotGenerate(
            f"{model.architecture} keeps something else than keys and values of each of its {count} "
            "layers"
        )
    return [finder.shapes[layer] for layer in range(count)]


def _is_prompt(text: Continuation) -> bool:
    """Whether the next token to compute is one of the prompt that no token is drawn after."""
    return text.num_cached < len(text.prompt_ids) - 1


def _token(text: Continuation, at: int) -> int:
    """Returns the token at a place of the text."""
    prompt = len(text.prompt_ids)
    return int(text.prompt_ids[at]) if at < prompt else text.new_ids[at - prompt]
