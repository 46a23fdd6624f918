"""Given ids, realized tokens and states are the teacher's own, on every architecture.

Each teacher has a padded vocabulary, and scores packed where it can, or one sequence at a time.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from logit_codec import Targets
from student_trainer.teachers.local import LocalTeacher
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import prepare
from tests.conftest import one_torch_thread
from tests.support import tiny

VOCAB, EFFECTIVE = 330, 300
LENGTHS = (37, 5)

one_thread = pytest.fixture(scope="module", autouse=True)(one_torch_thread)


@dataclass
class Case:
    """A teacher, sequences, and what the model's own forward says of them."""

    teacher: LocalTeacher
    sequences: list[Tensor]
    given: list[Tensor]
    logits: list[Tensor]
    """(L-1, EFFECTIVE) float64 each."""
    states: list[Tensor]
    """(L-1, layers + 1, D) each: what `output_hidden_states` returns."""

    def ask(self, targets: str, temperature: float = 1.0) -> list[Targets]:
        given = self.given if targets.startswith("given_ids") else None
        stream = self.teacher.stream(
            self.sequences, targets=targets, temperature=temperature, given_ids=given
        )
        return [scored for _, scored in stream]


@pytest.fixture(
    scope="module",
    params=[(name, packed) for name in tiny.ARCHITECTURES for packed in (True, False)],
    ids=lambda param: f"{param[0]}-{'packed' if param[1] else 'unpacked'}",
)
def case(request: pytest.FixtureRequest) -> Case:
    name, packed = request.param
    model = tiny.make_model(name, VOCAB)
    tokenizer = tiny.make_tokenizer([f"w{number}" for number in range(EFFECTIVE - 2)])
    generator = torch.Generator().manual_seed(0)
    sequences, given, logits, states = [], [], [], []
    for length in LENGTHS:
        token_ids = torch.randint(EFFECTIVE, (length,), generator=generator)
        ids = torch.randint(-1, EFFECTIVE, (length - 1, 17), generator=generator)
        ids[:, 0] = token_ids[1:]
        with torch.inference_mode():  # before the teacher takes the model over
            output = model(input_ids=token_ids[None], output_hidden_states=True)
        sequences.append(token_ids)
        given.append(ids)
        logits.append(output.logits[0, :-1, :EFFECTIVE].double())
        states.append(torch.stack([state[0, :-1] for state in output.hidden_states], 1))
    teacher = LocalTeacher(model, tokenizer)
    if not packed:
        teacher._engine = Engine(prepare(model, tokenizer, packed=False))
    return Case(teacher, sequences, given, logits, states)


@pytest.mark.parametrize(("bits", "bound"), [(32, 1e-5), (16, 5e-3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_given_ids_have_the_teachers_own_logprobs(
    case: Case, bits: int, bound: float, temperature: float
):
    answers = case.ask(f"given_ids:bits={bits},ranks=1", temperature)
    for targets, logits, given in zip(answers, case.logits, case.given, strict=True):
        logprobs = (logits / temperature).log_softmax(1)
        rows, ids = targets.entry_rows(), targets.token_ids
        assert [set(row.tolist()) - {-1} for row in given] == [
            set(ids[rows == row].tolist()) for row in range(len(given))
        ]
        assert (targets.logprobs - logprobs[rows, ids]).abs().max() <= bound
        rest = logprobs.exp().index_put((rows, ids), torch.zeros((), dtype=torch.float64)).sum(1)
        assert (targets.tail_logprob.exp() - rest).abs().max() <= 1e-5
        assert (targets.log_z - (logits / temperature).logsumexp(1)).abs().max() <= 1e-4
        # Rounding may exchange two ids that are as good as equal.
        own = logits[rows, ids][:, None]
        assert (targets.ranks >= (logits[rows] > own + 1e-4).sum(1)).all()
        assert (targets.ranks <= (logits[rows] > own - 1e-4).sum(1) - 1).all()


def test_realized_is_the_logprob_of_the_token_that_came_next(case: Case):
    for token_ids, logits in zip(case.sequences, case.logits, strict=True):
        expected = logits.log_softmax(1).gather(1, token_ids[1:, None])[:, 0]
        assert (case.teacher.compute_logprobs(token_ids) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("text", "bound"), [("hidden:bf16", 0.02), ("hidden:int8", 0.06)])
def test_hidden_states_and_the_head_are_the_teachers_own_distribution(
    case: Case, text: str, bound: float
):
    """bound: of the total variation; states of 64 numbers have little to average over."""
    for targets, logits in zip(case.ask(text, 2.0), case.logits, strict=True):
        dense = targets.to_dense().double()
        assert dense.shape == (len(logits), VOCAB)
        assert (dense[:, EFFECTIVE:] == 0).all()
        variation = (dense[:, :EFFECTIVE] - (logits / 2).softmax(1)).abs().sum(1) / 2
        assert variation.max() <= bound, variation.max()


def test_features_are_the_states_that_the_model_itself_returns(case: Case):
    for targets, states in zip(case.ask("features:layers=0+1+2"), case.states, strict=True):
        assert targets.layers == (0, 1, 2)
        scale = states.abs().amax().item()
        torch.testing.assert_close(
            targets.hidden.float(), states, rtol=2**-8, atol=1e-5 * max(1.0, scale)
        )
