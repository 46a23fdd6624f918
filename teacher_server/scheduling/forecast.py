"""Estimates how long texts that wait would take, from those before them."""

import math
from collections.abc import Iterable

from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.generation_job import GenerationJob
from teacher_server.scheduling.speed import KEPT, Speed


class TextForecast:
    """Follows how fast prompts and tokens are computed, and how long texts become. Not thread-safe."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._chunk_speed, self._step_speed = Speed(), Speed()
        self._usual_length = math.inf
        """New tokens of a text when it is over; infinite until one was."""

    def record_turn(self, cost: float, seconds: float, *, is_step: bool) -> None:
        """Counts a turn of texts."""
        speed = self._step_speed if is_step else self._chunk_speed
        speed.record(cost, seconds)

    def record_end(self, job: GenerationJob) -> None:
        """Counts a text that is over."""
        count = len(job.text.new_ids)
        before = count if math.isinf(self._usual_length) else self._usual_length
        self._usual_length = KEPT * before + (1 - KEPT) * count

    def seconds(self, jobs: Iterable[GenerationJob]) -> float:
        """Returns how long texts would take if they become as long as usual, and none longer than allowed."""
        chunks = steps = 0.0
        for job in jobs:
            written = len(job.text.new_ids)
            length = min(job.max_new_tokens, max(self._usual_length, written + 1))
            count = max(0.0, length - written)
            place = job.text.num_tokens + int(count) // 2
            chunks += self._costs.chunk(job.text.num_cached, job.text.num_tokens - 1)
            steps += count * self._costs.row(place, job.row_nbytes)
        return self._chunk_speed.seconds(chunks) + self._step_speed.seconds(steps)
