"""Computes the fused loss inside a causal LM's own forward pass, in place of its output head.

Letters: B sequences, T tokens, D hidden size, V vocabulary.

While `loss` runs, the head's forward is a function that takes the hidden states, computes the loss
from them and the head's weight, and gives the model a few logits to continue with. So everything
before the head is the model's own code, and the loss is computed where wrappers expect the head to
be used: DDP finds the weight in the graph of what is returned, FSDP has it gathered. DeepSpeed's
ZeRO-3 frees the head's weight and the graph that leads to it after forward, so it needs logits.

What the model does to its logits is read from its config and verified: `FusedHead.of` runs the
model once with known numbers in place of the head's output and compares the result.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from logitstream.head_arithmetic import read_head_arithmetic
from student_trainer.losses.causal import evaluating

Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Hidden states (B, T, D), the head's weight (V, D) and its bias (V,) or None -> the loss."""

TRIED_LOGITS = (0.0, 1.0, 40.0)
"""Heights of the ramps that are sent through the model in place of logits."""


class Unfusable(Exception):
    """Raised with the reason why the logits of this student are needed."""


class StandIn:
    """Is called in place of the head's forward.

    For a compiler this is the same object in every step, so that nothing is compiled again, and it
    is left alone: the student is compiled as far as the head.
    """

    forward: Callable[[Tensor], Tensor]

    @torch.compiler.disable
    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Runs what stands in at this time."""
        return self.forward(hidden_BTD)


@dataclass(frozen=True, slots=True, eq=False)
class FusedHead:
    """Describes a head that is a plain matrix product, and what the model does to its output.

    logits = softcap * tanh(logit_scale * head(hidden) / softcap); without softcap, they are
    logit_scale * head(hidden).
    """

    student: nn.Module
    """The causal LM, or a PEFT model of one."""
    head: nn.Linear
    softcap: float | None
    logit_scale: float
    stand_in: StandIn = field(default_factory=StandIn)

    @classmethod
    def of(cls, model: nn.Module, student: nn.Module, inputs: Mapping[str, Any]) -> "FusedHead":
        """Finds the head of `student`, which `model` is or wraps; tries it on a batch's `inputs`.

        Raises Unfusable, with the reason.
        """
        head = _plain_head(student)
        config: Any = getattr(student, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else None
        fused = cls(student, head, *read_head_arithmetic(config))
        fused._check(model, inputs)
        return fused

    def loss(
        self, model: nn.Module, inputs: Mapping[str, Any], compute: Compute
    ) -> tuple[Tensor, Any]:
        """Runs `model(**inputs)` and returns what `compute` makes of its hidden states.

        And the model's outputs, whose logits are of no use.
        """
        losses: list[Tensor] = []

        def forward(hidden_BTD: Tensor) -> Tensor:
            losses.append(compute(hidden_BTD, self.head.weight, self.head.bias))
            # The shape that `_check` tried, so that nothing after the head fails only now.
            zeros = hidden_BTD.new_zeros(1, len(TRIED_LOGITS), self.head.out_features)
            return zeros + (losses[0] * 0.0).to(zeros.dtype)

        with self._replace_head(forward):
            outputs = model(**inputs)
        # DDP looks for used parameters in what the wrapped module returns. FSDP2 gathers the
        # parameters of a unit again when the gradient comes to what the unit returned: the loss,
        # which might be rounded on its way through head and student, waits for their zeros.
        return losses[0] + _logits_of(outputs).sum().to(losses[0].dtype) * 0.0, outputs

    @torch.no_grad()
    def _check(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Raises Unfusable unless the model's logits are what softcap and logit_scale say."""
        seen: list[Tensor] = []
        ramps = torch.linspace(-1.0, 1.0, self.head.out_features)
        ramps = ramps * torch.tensor(TRIED_LOGITS)[:, None]

        def forward(hidden_BTD: Tensor) -> Tensor:
            seen.append(hidden_BTD)
            return ramps.to(hidden_BTD)[None]

        try:
            with evaluating(model), self._replace_head(forward), _without_compiling():
                outputs = model(**inputs)
        except (RuntimeError, IndexError) as error:
            raise Unfusable(f"its forward pass needs a logit for each token: {error}") from error
        if [hidden.shape[:-1] for hidden in seen] != [inputs["input_ids"].shape]:
            raise Unfusable("its forward pass does not use the head once, on every token")
        logits = _logits_of(outputs)
        expected = ramps.to(seen[0]).to(logits)[None] * self.logit_scale
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        tolerance = 16 * max(torch.finfo(tensor.dtype).eps for tensor in (seen[0], logits))
        if logits.shape != expected.shape or not torch.allclose(
            logits, expected, rtol=tolerance, atol=tolerance
        ):
            raise Unfusable("it does more to its logits than to scale and softcap them")

    @contextmanager
    def _replace_head(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        # On the instance, so that hooks and wrappers of the module still run.
        self.stand_in.forward = forward
        vars(self.head)["forward"] = self.stand_in
        try:
            yield
        finally:
            del vars(self.head)["forward"], self.stand_in.forward


def _plain_head(student: nn.Module) -> nn.Linear:
    """Returns the output embedding if calling it multiplies by its weight. Raises Unfusable."""
    get_head = getattr(student, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    # A subclass with the same forward will do: fully_shard makes one.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise Unfusable(f"its head is {type(head).__name__}, not a plain nn.Linear")
    if "forward" in vars(head):
        raise Unfusable("something replaces the forward method of its head")
    if any(hasattr(parameter, "ds_status") for parameter in student.parameters()):
        raise Unfusable("DeepSpeed ZeRO-3 keeps its parameters in parts, and gathers them itself")
    return head


def _without_compiling() -> AbstractContextManager[None]:
    """Runs what is compiled as it was: to compile it for one batch would take minutes."""
    return torch.compiler.set_stance("force_eager")


def _logits_of(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
