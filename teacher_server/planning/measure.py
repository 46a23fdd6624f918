"""Measures what the production engine scores per second, with random weights, on the device at hand.

A model that is too large for the device, or too slow for a measurement of seconds, is measured with two
smaller numbers of layers. The time of a layer is the difference; what is left is the time of all else.
"""

import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from logit_codec import encode_parts, ids_digest, parse_targets, uniforms
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine
from teacher_server.engine.layers import find_layers
from teacher_server.engine.loading import load
from teacher_server.errors import ModelError
from teacher_server.planning.answers import GIVEN_IDS, PART_NBYTES
from teacher_server.planning.flops import count_flops
from teacher_server.planning.gpus import GIB, Gpu
from teacher_server.planning.memory import MemoryOptions, estimate_memory
from teacher_server.planning.sizes import build, describe_layers, measure_sizes

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""Of a measurement, all lengths and kinds of targets together, loading not counted."""
MIN_TURNS, TURNS = 3, 8
"""The fewest turns, and those for which batches are chosen."""
MAX_BATCH_S = 2.0
"""Longest time that a batch should take, by the guess below; else fewer layers are measured."""
GUESSED_EFFICIENCY = 0.5
FACTORS = (8, 6, 4, 3, 2)
"""How many times as many repeated layers the larger of two models may have."""
IN_FLIGHT = 2
SAFETY = 0.8
"""Share of the free memory that a measurement may use."""


@dataclass(frozen=True, slots=True)
class Depths:
    """Says with how many layers a model is measured."""

    measured: tuple[int, ...]
    """One number if it is measured as it is, else two."""
    whole: int

    def extrapolate(self, values: Sequence[float]) -> float:
        """Draws a line through what was measured at these numbers of layers."""
        if len(values) == 1:
            return values[0]
        (few, more), (short, long) = self.measured, values
        return short + (long - short) * (self.whole - few) / (more - few)

    def describe(self) -> str:
        """Says what was measured."""
        if len(self.measured) == 1:
            return f"all {self.whole} layers"
        few, more = self.measured
        return f"{few} and {more} of {self.whole} layers, extrapolated"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Holds what was measured."""

    seconds: dict[tuple[str, int], float]
    """Per token, by targets and length."""
    depths: Depths
    device: str
    threads: int
    share_of_cores: float
    """CPU time of this process by that of as many cores as it has threads; on a CPU 1 unless others
    compute beside it."""


def measure_engine(
    config: Any,
    gpu: Gpu,
    options: MemoryOptions,
    *,
    device: str,
    targets: Sequence[str],
    lengths: Sequence[int],
    seconds: float = SECONDS,
    depths: Depths | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Measures packs of some lengths and targets. Raises ModelError.

    depths: by default all layers, or as few as the device needs.
    clock: CPU time instead of the wall's says what one thread does on a machine that others use too.
    """
    depths = depths or choose_depths(config, gpu, options, max(lengths))
    engines = [_load_engine(config, depth, options, device) for depth in depths.measured]
    try:
        works = {
            (kind, length): [_Work(engine, kind, length, clock) for engine in engines]
            for kind in targets
            for length in lengths
        }
        share = seconds / sum(map(len, works.values()))
        for some in works.values():
            for work in some:
                work.choose_batch(share)
        began, cpu_began = time.perf_counter(), time.process_time()
        turns = _take_turns(works, seconds)
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    except ValueError as error:  # targets that this teacher does not offer
        raise ModelError(str(error)) from error
    return Measurement(
        seconds={key: _extrapolate(depths, some) for key, some in turns.items()},
        depths=depths,
        device=device,
        threads=torch.get_num_threads(),
        share_of_cores=cpu_s / wall_s / torch.get_num_threads(),
    )


def choose_depths(config: Any, gpu: Gpu, options: MemoryOptions, length: int) -> Depths:
    """Chooses how many layers to measure: all, if they fit and are quick. Raises ModelError."""
    whole = config.get_text_config().num_hidden_layers

    def fits(*depths: int) -> bool:
        nbytes = 0.0
        for depth in depths:
            each = estimate_memory(measure_sizes(with_layers(config, depth)), 1, options)
            nbytes += each.weights + each.logits + each.activations
        return nbytes <= SAFETY * options.device_nbytes

    def is_quick(depth: int) -> bool:
        flops = length * count_flops(measure_sizes(with_layers(config, depth)), length).total
        return flops / (gpu.tflops * 1e12 * GUESSED_EFFICIENCY) <= MAX_BATCH_S

    if fits(whole) and is_quick(whole):
        return Depths((whole,), whole)
    first, period = find_period(_describe_each(config))
    few = first + period
    # The further they are apart, the less of what is extrapolated is noise.
    for factor in FACTORS:
        more = first + factor * period
        if more < whole and fits(few, more) and (factor == FACTORS[-1] or is_quick(more)):
            _check_prefix(config, more)
            return Depths((few, more), whole)
    if fits(whole):
        return Depths((whole,), whole)
    raise ModelError(
        f"not even {few} and {first + FACTORS[-1] * period} of {whole} layers of this model fit into "
        f"{SAFETY * options.device_nbytes / GIB:,.1f} GiB, which --measure may use. Measure on a larger "
        "device, or plan without --measure."
    )


def find_period(layers: Sequence[Any]) -> tuple[int, int]:
    """Finds how many layers come before those that repeat, and after how many they do."""
    for period in range(1, len(layers)):
        for first in range(len(layers) - 2 * period + 1):
            if all(layers[at] == layers[at + period] for at in range(first, len(layers) - period)):
                return first, period
    return 0, len(layers)


def with_layers(config: Any, depth: int) -> Any:
    """Copies a config with only its first layers."""
    content = config.to_dict()
    text = config.get_text_config()
    whole = text.num_hidden_layers
    place = content
    if text is not config:
        name = next(name for name in content if getattr(config, name, None) is text)
        place = content[name]
    for name, value in place.items():
        if isinstance(value, list) and len(value) == whole:
            place[name] = value[:depth]
    # Under the name that this config's own files use, such as n_layer.
    attribute = (getattr(text, "attribute_map", None) or {}).get(
        "num_hidden_layers", "num_hidden_layers"
    )
    place[attribute] = depth
    return type(config).from_dict(content)


def _describe_each(config: Any) -> list[tuple[Any, ...]]:
    """Describes each layer by its weights and what its attention sees."""
    layers = find_layers(build(config))
    attention = describe_layers(config.get_text_config())
    if layers is None:
        raise ModelError(
            "the layers of this architecture were not found: it can only be measured whole"
        )
    return [
        (tuple((name, *weight.shape) for name, weight in layer.named_parameters()), each)
        for layer, each in zip(layers, attention, strict=True)
    ]


def _check_prefix(config: Any, depth: int) -> None:
    """Raises ModelError if fewer layers are not the first ones of all."""
    if _describe_each(with_layers(config, depth)) != _describe_each(config)[:depth]:
        raise ModelError(
            f"the first {depth} layers of this architecture depend on how many there are: it can only "
            "be measured on a device that it fits on"
        )


def _load_engine(config: Any, depth: int, options: MemoryOptions, device: str) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        with_layers(config, depth).save_pretrained(folder)
        model = load(folder, device=device, dtype=options.dtype, load_format="dummy")
    return Engine(model, chunk_nbytes=options.chunk_nbytes, pack_tokens=options.pack_tokens)


class _Work:
    """Scores sequences of one length for one kind of targets, and encodes the answers."""

    def __init__(
        self, engine: Engine, targets: str, length: int, clock: Callable[[], float]
    ) -> None:
        self.engine = engine
        self._clock = clock
        self._spec = engine.model.complete(parse_targets(targets))
        if self._spec.needs_given_ids:
            self._spec = self._spec.for_rows(GIVEN_IDS)
        self._length = length
        self._on_cpu = engine.model.device.type == "cpu"
        self._requests = [self._make_request(0)]
        self._count = 1

    def _make_request(self, seed: int) -> RowRequest:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.engine.model.effective_vocab_size
        ids = torch.randint(vocabulary, (self._length,), generator=generator)
        rows = torch.arange(self._length - 1)
        drawn = given = None
        if self._spec.needs_uniforms:
            drawn = uniforms(0, 0, ids_digest(ids), rows)
        if self._spec.needs_given_ids:
            shape = (self._length - 1, GIVEN_IDS)
            given = torch.randint(vocabulary, shape, generator=generator).sort(1).values
        return RowRequest(ids, rows, self._spec, uniforms=drawn, given_ids=given)

    def choose_batch(self, seconds: float) -> None:
        """Fills a pack, or as much of it as leaves time for enough turns."""
        self.run()  # what the first computation makes once is not measured
        per_sequence_s = self.run() * self._length
        fitting = max(1, self.engine.pack_tokens // self._length)
        if self._on_cpu:
            fitting = min(fitting, max(1, math.floor(seconds / TURNS / per_sequence_s)))
        self._requests = [self._make_request(seed) for seed in range(fitting)]
        # A GPU computes one batch while the next is laid out: batches in a row, some for each turn.
        self._count = 1 if self._on_cpu else 2 * IN_FLIGHT

    def run(self) -> float:
        """Scores the batch, a few times on a GPU; returns seconds per token."""
        began = self._clock()
        launched = []
        for _ in range(self._count):
            if len(launched) == IN_FLIGHT:
                self._finish(launched.pop(0))
            launched.append(self.engine.launch(self._requests))
        for last in launched:
            self._finish(last)
        tokens = self._count * len(self._requests) * self._length
        return (self._clock() - began) / tokens

    def _finish(self, launched: Any) -> None:
        """Takes the result; on a CPU encoding shares the cores, and counts."""
        rows, _ = self.engine.result(launched)
        if self._on_cpu:
            for each in rows:
                for _ in encode_parts(each.compact(), self._spec, max_nbytes=PART_NBYTES):
                    pass


@torch.inference_mode()
def _take_turns(
    works: dict[tuple[str, int], list[_Work]], seconds: float
) -> dict[tuple[str, int], list[list[float]]]:
    """Runs all in turns until the time is over; returns seconds per token of each turn."""
    turns: dict[tuple[str, int], list[list[float]]] = {key: [] for key in works}
    began = time.perf_counter()
    count = 0
    while count < MIN_TURNS or time.perf_counter() - began < seconds:
        for key, some in works.items():
            turns[key].append([work.run() for work in some])
        count += 1
    logger.info("measured turns=%d s=%.1f", count, time.perf_counter() - began)
    return turns


def _extrapolate(depths: Depths, turns: Sequence[Sequence[float]]) -> float:
    """Returns the median of the turns. Raises ModelError if they say nothing.

    Within a turn, for then whatever else the machine does slows both numbers of layers down.
    """
    seconds = statistics.median(depths.extrapolate(turn) for turn in turns)
    if seconds < statistics.median(turn[-1] for turn in turns):
        few, more = depths.measured[0], depths.measured[-1]
        raise ModelError(
            f"{more} layers took no longer than {few}: this machine is too busy with other work to "
            "measure on. Try again when it is idle."
        )
    return seconds
