"""Checks each GenerateRequest once, where it enters, and turns it into jobs: one for each sample.

Every refusal says what was sent, what is allowed and what to do.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import grpc
import numpy as np
import torch

from logit_codec import TargetSpec
from logitstream.messages import scope_of
from protos import teacher_pb2
from teacher_server.admission.access import scope_missing
from teacher_server.admission.requests import LEVELS, Admission
from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.stops import StopRule
from teacher_server.errors import RequestRefused, invalid
from teacher_server.scheduling.generation_job import GenerationJob, SampleGroup
from teacher_server.teams.declaration import DEFAULT_TEAM, Team

MAX_SAMPLES = 256
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
TOKEN_NBYTES = 64
"""Upper bound of what a token of an answer takes beside its targets."""


class Writer(Protocol):
    """Lists what admission has to know of a teacher that writes."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def effective_vocab_size(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def tokenizer(self) -> Any | None: ...


class GenerationAdmission:
    """Checks requests for texts against the teacher and the limits.

    max_tokens: of a text, its prompt included; 0 if the teacher writes none, and why_not says why.
    """

    def __init__(
        self,
        admission: Admission,
        teacher: Writer,
        *,
        max_tokens: int,
        why_not: str,
    ) -> None:
        self._admission = admission
        self._max_tokens = max_tokens
        self._why_not = why_not
        self._stop_ids = teacher.stop_ids
        self._tokenizer = teacher.tokenizer
        self._vocab_size = teacher.vocab_size
        self._effective = teacher.effective_vocab_size

    @property
    def fingerprint(self) -> str:
        """Of the teacher that writes."""
        return self._admission.fingerprint

    def admit(
        self, request: teacher_pb2.GenerateRequest, team: Team = DEFAULT_TEAM
    ) -> list[GenerationJob]:
        """Returns a job for each sample. Raises RequestRefused."""
        if not self._max_tokens:
            raise RequestRefused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "CANNOT_GENERATE",
                f"this teacher writes no texts: {self._why_not}. It can score texts that others wrote.",
            )
        self._admission.check_envelope(request)
        spec = self._read_spec(request, team)
        id_table = self._admission.find_table(request.targets.id_table)
        prompt = self._read_ids(request.prompt_ids, "prompt_ids")
        if not len(prompt):
            raise invalid(
                "EMPTY_REQUEST",
                "a prompt needs at least one token, got none. Begin with the begin token, if the teacher "
                "has one.",
                field="prompt_ids",
            )
        samples = self._read_samples(request)
        self._check_size(request, len(prompt), samples, team)
        stop_rule = self._make_stop_rule(request)
        rule = _read_rule(request)
        temperature = request.target_temperature or rule.temperature or 1.0
        _check_temperature(temperature, "target_temperature")
        prompt_ids = torch.from_numpy(prompt.astype(np.int64))
        row_nbytes = 0 if spec is None else math.ceil(spec.max_row_nbytes(self._vocab_size))
        group = SampleGroup()
        jobs = []
        for number, received in samples:
            text = Continuation(
                prompt_ids,
                DrawRule(
                    temperature=rule.temperature,
                    top_k=rule.top_k,
                    top_p=rule.top_p,
                    seed=request.seed,
                    epoch=request.epoch,
                    sample=number,
                ),
                spec,
                temperature,
                new_ids=received,
            )
            self._check_unfinished(stop_rule, text, number)
            job = GenerationJob(
                text,
                stop_rule,
                request.max_new_tokens,
                row_nbytes=row_nbytes + TOKEN_NBYTES,
                level=LEVELS[request.level],
                team=team,
                group=group,
                id_table=id_table,
            )
            job.held = job.num_tokens
            jobs.append(job)
        return jobs

    def _read_spec(self, request: teacher_pb2.GenerateRequest, team: Team) -> TargetSpec | None:
        """Reads what is kept of the distributions; None: nothing."""
        kind = request.targets.WhichOneof("kind")
        if kind is None:
            return None
        scope = scope_of(request.targets)
        if scope != "score" and scope not in team.scopes:
            raise scope_missing(team, scope, f"targets of kind {kind}", field="targets")
        if kind == "given_ids":
            raise invalid(
                "BAD_TARGETS",
                "targets of kind given_ids need ids for each token, and nobody knows yet which tokens "
                "will be written. Ask for top_k, or score the finished text.",
                field="targets.given_ids",
            )
        return self._admission.read_spec(request)

    def _read_ids(self, data: bytes, field: str) -> np.ndarray:
        """Reads ids as (N,) int32 and checks their range."""
        if len(data) % 4:
            raise invalid(
                "LENGTHS_DO_NOT_FIT",
                f"{field} has {len(data)} bytes, which are no whole number of ids of 4 bytes.",
                field=field,
            )
        ids = np.frombuffer(data, dtype="<i4")
        wrong = (ids < 0) | (ids >= self._effective)
        if wrong.any():
            place = int(wrong.argmax())
            raise invalid(
                "TOKEN_ID_OUT_OF_RANGE",
                f"token {place} of {field} has id {int(ids[place])}; this teacher's ids are 0 to "
                f"{self._effective - 1}. Use the teacher's tokenizer.",
                field=field,
            )
        return ids

    def _read_samples(self, request: teacher_pb2.GenerateRequest) -> list[tuple[int, list[int]]]:
        """Returns the number of each sample, and what was received of it."""
        if len(request.samples) > MAX_SAMPLES:
            raise invalid(
                "TOO_MANY_SEQUENCES",
                f"a request may have {MAX_SAMPLES} samples, got {len(request.samples)}. Send several "
                "requests; samples differ by their numbers.",
                field="samples",
            )
        samples = request.samples or [teacher_pb2.Sample()]
        numbers = [sample.number for sample in samples]
        if len(set(numbers)) < len(numbers):
            twice = next(one for one in numbers if numbers.count(one) > 1)
            raise invalid(
                "BAD_SAMPLES",
                f"each sample needs a number of its own, {twice} is there twice.",
                field="samples",
            )
        return [
            (sample.number, self._read_ids(sample.received_ids, "samples.received_ids").tolist())
            for sample in samples
        ]

    def _check_size(
        self,
        request: teacher_pb2.GenerateRequest,
        prompt_tokens: int,
        samples: Sequence[tuple[int, list[int]]],
        team: Team,
    ) -> None:
        """Checks how much may be written."""
        most = request.max_new_tokens
        longest = max(len(received) for _, received in samples)
        if most <= longest:
            raise invalid(
                "BAD_MAX_NEW_TOKENS",
                f"max_new_tokens must be above the {longest} tokens that were received, got {most}.",
                field="max_new_tokens",
            )
        if prompt_tokens + most > self._max_tokens:
            raise invalid(
                "TOO_MANY_TOKENS",
                f"a prompt and what is written after it may have {self._max_tokens} tokens together, "
                f"got {prompt_tokens} and {most}. Shorten either. The operator can raise the limit "
                "with --generation.pool-mib if the teacher's context allows it.",
                field="max_new_tokens",
            )
        limits, total = team.limits, len(samples) * (prompt_tokens + most)
        limit = limits.max_request_tokens
        if limit is not None and total > limit:
            raise invalid(
                "TOO_MANY_TOKENS",
                f"{total} tokens in one request; team {team.name} may ask for at most {limit}. Ask "
                "for fewer samples or tokens per request.",
                field="max_new_tokens",
            )

    def _make_stop_rule(self, request: teacher_pb2.GenerateRequest) -> StopRule:
        """Reads when a text ends."""
        strings = list(request.stop_strings)
        if len(strings) > MAX_STOP_STRINGS or any(
            len(one) > MAX_STOP_CHARACTERS for one in strings
        ):
            raise invalid(
                "BAD_STOP_STRINGS",
                f"at most {MAX_STOP_STRINGS} stop strings of at most {MAX_STOP_CHARACTERS} characters "
                f"can be looked for, got {len(strings)}, the longest of "
                f"{max(map(len, strings))}. Use stop ids, or cut the text afterwards.",
                field="stop_strings",
            )
        outside = [one for one in request.stop_ids if one >= self._effective]
        if outside:
            raise invalid(
                "TOKEN_ID_OUT_OF_RANGE",
                f"stop_ids has the id {outside[0]}; this teacher's ids are 0 to {self._effective - 1}.",
                field="stop_ids",
            )
        stop_ids = {*request.stop_ids}
        if not request.ignore_teacher_stop_ids:
            stop_ids.update(self._stop_ids)
        try:
            return StopRule(stop_ids, strings, request.max_new_tokens, self._tokenizer)
        except ValueError as error:
            raise invalid("BAD_STOP_STRINGS", f"{error}.", field="stop_strings") from None

    def _check_unfinished(self, stop_rule: StopRule, text: Continuation, number: int) -> None:
        """Refuses to go on with a text that has ended."""
        if text.new_ids and stop_rule.check(text):
            raise invalid(
                "BAD_SAMPLES",
                f"sample {number} has ended with what was received of it. Send the samples that have "
                "not ended.",
                field="samples",
            )


def _read_rule(request: teacher_pb2.GenerateRequest) -> DrawRule:
    """Reads how tokens are drawn."""
    draw = request.draw
    temperature = draw.temperature if draw.HasField("temperature") else 1.0
    if temperature != 0:
        _check_temperature(temperature, "draw.temperature")
    if not (math.isfinite(draw.top_p) and 0 <= draw.top_p <= 1):
        raise invalid(
            "TOP_P_OUT_OF_RANGE",
            f"top_p must be 0 to 1, got {draw.top_p}.",
            field="draw.top_p",
        )
    return DrawRule(temperature=temperature, top_k=draw.top_k, top_p=draw.top_p or 1.0)


def _check_temperature(temperature: float, field: str) -> None:
    if not (math.isfinite(temperature) and 1e-3 <= temperature <= 1e3):
        zero = ", or 0 for the likeliest ids" if field == "draw.temperature" else ""
        raise invalid(
            "TEMPERATURE_OUT_OF_RANGE",
            f"{field} must be between 0.001 and 1000{zero}, got {temperature}.",
            field=field,
        )
