"""What a student writes: its masks and ids, its loss against an oracle, staleness, resuming."""

import copy
import time
from typing import Any

import pytest
import torch
from transformers.generation import utils as generation

from student_trainer import (
    InvalidRequest,
    LocalTeacher,
    OnPolicyArguments,
    OnPolicyBatches,
    TeacherError,
    UnsuitableTargets,
    distillation_loss,
)
from student_trainer.on_policy.measures import count_repetitions
from student_trainer.on_policy.prompts import take_prompts
from student_trainer.on_policy.writing import Writer, WrittenTexts
from student_trainer.teachers.layout import Layout
from tests.conftest import one_torch_thread
from tests.support import tiny

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

VOCABULARY = 64
STOP = 1
PROMPTS = [[5, 6, 7 + number % 40, 8] for number in range(80)]


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(tiny.make_model("Llama", VOCABULARY, seed=1))


def make_batches(student: Any, teacher: Any, **settings: Any) -> OnPolicyBatches:
    own = {"batch_size": 4, "prompts": PROMPTS} | {
        name: settings.pop(name)
        for name in ("batch_size", "prompts", "batches_per_step", "tokenizer", "seed")
        if name in settings
    }
    arguments = OnPolicyArguments(**{"max_new_tokens": 12, **settings})
    return OnPolicyBatches(student, teacher=teacher, arguments=arguments, **own)


def compute_rows(student: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(R, V) logits of the trained rows."""
    trained = batch["labels"][:, 1:].flatten() != -100
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].flatten(0, 1)[trained]


def take_step(student: Any, optimizer: Any, batch: Any, targets: Any) -> float:
    loss = distillation_loss(compute_rows(student, batch), targets, divergence="reverse_kl")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("targets", ["given_ids", "hidden:bf16"])
def test_the_reverse_kl_of_its_text_is_that_of_the_whole_vocabulary(teacher, targets):
    student = tiny.make_model("Llama", VOCABULARY)
    # With every id named, nothing is left for the tail.
    batch, found = next(make_batches(student, teacher, targets=targets, support=VOCABULARY))
    logits_RV = compute_rows(student, batch)
    assert found.num_rows == len(logits_RV)
    loss = distillation_loss(logits_RV, found, divergence="reverse_kl")
    own_RV = logits_RV.double().log_softmax(1)
    teacher_model = tiny.make_model("Llama", VOCABULARY, seed=1)
    theirs_RV = compute_rows(teacher_model, batch).double().log_softmax(1).detach()
    oracle = (own_RV.exp() * (own_RV - theirs_RV)).sum(1).mean()
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-2, atol=1e-3)
    # And so is its gradient, which only the trained forward pass made.
    gradients = [
        torch.autograd.grad(one, list(student.parameters()), retain_graph=True)
        for one in (loss, oracle)
    ]
    ours, theirs = (torch.cat([one.flatten() for one in each]) for each in gradients)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_what_is_written_has_no_gradient_and_changes_nothing_of_the_training():
    student = tiny.make_student(dropout=0.5).train()
    student.transformer.wte.eval()  # what the user has frozen stays as it is
    modes = [module.training for module in student.modules()]
    settings = student.generation_config
    writer = Writer(student, None, OnPolicyArguments(), num_ids=VOCABULARY, seed=0)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, again = (
        writer.write([torch.tensor([4, 5, 6])], name="same", version=0) for _ in range(2)
    )
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in student.modules()] == modes
    assert student.generation_config is settings
    assert torch.equal(first.token_ids[0], again.token_ids[0])  # in spite of the dropout
    other = writer.write([torch.tensor([4, 5, 6])], name="other", version=0)
    assert not torch.equal(first.token_ids[0], other.token_ids[0])
    tensors = first.to_tensors().values()
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)


def test_special_tokens_prompts_and_everything_after_a_stop_are_not_trained(teacher):
    student = tiny.make_model("Llama", VOCABULARY)
    with torch.no_grad():
        student.lm_head.weight[STOP] = 0.2 * student.lm_head.weight[20:30].sum(0)
    written = make_batches(student, teacher, batch_size=40, max_new_tokens=30)
    batch, targets = next(written)
    stopped = 0
    for ids, labels, real in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        length = int(real.sum())
        assert (labels[:4] == -100).all()
        assert (labels[length:] == -100).all()
        stops = (ids[4:length] == STOP).nonzero()[:, 0].tolist()
        trained = length - (1 if stops else 0)
        assert torch.equal(labels[4:trained], ids[4:trained])
        if stops:
            assert stops == [length - 5]  # the last token, and the only one
            assert labels[length - 1] == -100
            stopped += 1
    assert 0 < stopped < 40
    assert targets.num_rows == int((batch["labels"] != -100).sum())
    logs = written.take_logs()
    assert logs["on_policy_stopped"] == stopped / 40
    # Every named id has its place: the one that was written is among those of its row.
    rows, labels = Layout.of(batch).trained, batch["labels"][:, 1:]
    wanted = labels[rows[:, :-1]]
    starts = targets.row_splits
    for row in (0, 7, targets.num_rows - 1):
        assert wanted[row] in targets.token_ids[starts[row] : starts[row + 1]]
    also = make_batches(
        student, teacher, batch_size=40, max_new_tokens=30, train_special_tokens=True
    )
    assert next(also)[1].num_rows == targets.num_rows + stopped


def test_likeliest_ids_and_entropies_are_those_of_the_trained_forward_pass():
    student = tiny.make_model("Llama", VOCABULARY)
    arguments = OnPolicyArguments(
        support=5, sampling_temperature=0.7, sampling_top_k=9, sampling_top_p=0.9
    )
    writer = Writer(student, None, arguments, num_ids=60, seed=0)
    prompts = [torch.tensor([4, 5, 6]), torch.tensor([9, 8, 7, 6, 5])]  # padded on the left
    texts = writer.write(prompts, name="", version=0)
    batch = texts.make_batch(0, torch.tensor([], dtype=torch.int64), {})
    logprobs = compute_rows(student, batch)[:, :60].log_softmax(1)
    assert len(logprobs) == texts.num_written
    entropies = -(logprobs.exp() * logprobs).sum(1)
    torch.testing.assert_close(texts.entropies, entropies.detach(), rtol=1e-4, atol=1e-5)
    likeliest = logprobs.topk(5, 1).indices.int().sort(1).values
    assert (texts.likeliest.sort(1).values == likeliest).float().mean() > 0.99
    drawn = torch.cat([ids[len(p) :] for ids, p in zip(texts.token_ids, prompts, strict=True)])
    rank = (logprobs > logprobs.gather(1, drawn[:, None])).sum(1)
    assert int(rank.max()) < 9
    assert int(drawn.max()) < 60


def test_a_temperature_of_zero_writes_what_transformers_does():
    student = tiny.make_model("Qwen3", VOCABULARY)
    prompts = [torch.tensor([4, 5, 6]), torch.tensor([9, 8, 7, 6, 5])]
    arguments = OnPolicyArguments(sampling_temperature=0, max_new_tokens=20)
    writer = Writer(student, None, arguments, num_ids=VOCABULARY, seed=0)
    texts = writer.write(prompts, name="", version=0)
    for prompt, ids in zip(prompts, texts.token_ids, strict=True):
        alone = student.generate(prompt[None], do_sample=False, max_new_tokens=20)[0]
        assert torch.equal(ids, alone)


class Slow(LocalTeacher):
    """A teacher that is asked in threads, like one elsewhere, and takes its time."""

    is_remote = True

    def submit(self, piece, options):
        time.sleep(0.05)
        return super().submit(piece, options)


@pytest.mark.parametrize(("staleness", "per_step"), [(0, 1), (1, 1), (2, 3)])
def test_however_slow_the_teacher_is_no_text_is_staler_than_allowed(staleness, per_step):
    student = tiny.make_student()
    batches = make_batches(
        student,
        Slow(tiny.make_model("Llama", VOCABULARY, seed=1)),
        max_staleness=staleness,
        batches_per_step=per_step,
    )
    for number in range(4 * per_step):
        next(batches)
        assert batches.take_logs()["on_policy_staleness"] == min(number // per_step, staleness)
        if number % per_step == per_step - 1:
            batches.step()
    assert batches.take_logs()["on_policy_rewritten"] == 0
    batches.close()


def test_a_text_that_grew_too_stale_is_written_again(teacher):
    batches = make_batches(tiny.make_student(), teacher, max_staleness=1)
    next(batches)
    for _ in range(3):  # more steps than were announced
        batches.step()
    next(batches)
    logs = batches.take_logs()
    assert logs["on_policy_max_staleness"] <= 1
    assert logs["on_policy_rewritten"] == 1


@pytest.mark.parametrize("staleness", [0, 2])
def test_it_resumes_to_the_bit(teacher, staleness):
    def train(steps: int, saved: Any = None, save_at: int | None = None) -> tuple[list[float], Any]:
        student = tiny.make_student()
        optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
        batches = make_batches(student, teacher, max_staleness=staleness, seed=5)
        if saved is not None:
            student.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            batches.load_state_dict(saved[2])
        losses, state = [], None
        for _ in range(steps):
            losses.append(take_step(student, optimizer, *next(batches)))
            batches.step()
            if len(losses) == save_at:
                parts = student.state_dict(), optimizer.state_dict(), batches.state_dict()
                state = copy.deepcopy(parts)
        with pytest.raises(TeacherError, match="before the first batch"):
            batches.load_state_dict(batches.state_dict())
        return losses, state

    whole, saved = train(7, save_at=3)
    assert train(4, saved)[0] == whole[3:]
    assert len({*whole}) == 7


def test_the_share_of_the_batches_is_the_fraction_wherever_one_looks():
    for fraction in (0.1, 0.5, 0.75, 1.0):
        arguments = OnPolicyArguments(fraction=fraction)
        chosen = [arguments.chooses(3, number) for number in range(400)]
        assert chosen == [arguments.chooses(3, number) for number in range(400)]
        for start in (0, 37, 200):
            assert abs(sum(chosen[start : start + 40]) - 40 * fraction) <= 1
    begun = {OnPolicyArguments(fraction=0.5).chooses(seed, 0) for seed in range(20)}
    assert begun == {True, False}


def test_prompts_are_beginnings_or_what_comes_before_the_first_trained_token():
    batch = {
        "input_ids": torch.tensor([[0, 11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    }
    assert [p.tolist() for p in take_prompts(batch, 3, 100)] == [[11, 12, 13], [21, 22, 23]]
    labels = torch.tensor([[-100, -100, -100, -100, 14, 15], [-100, 22, 23, 24, 25, 26]])
    found = take_prompts({**batch, "labels": labels}, 2, 100)
    assert [p.tolist() for p in found] == [[11, 12, 13], [21, 22]]
    # A question that is too long keeps its end.
    assert take_prompts({**batch, "labels": labels}, 2, 2)[0].tolist() == [12, 13]
    packed = {
        "input_ids": batch["input_ids"],
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]] * 2),
    }
    assert [p.tolist() for p in take_prompts(packed, 4, 100)] == [[0, 11], [21, 22]]


def test_texts_chats_and_ids_are_prompts(teacher):
    tokenizer = tiny.make_tokenizer([f"w{number}" for number in range(62)])
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w2{% endif %}"
    )
    prompts = ["w5 w6", [{"role": "user", "content": "w7"}], [9, 10], torch.tensor([11])]
    batches = make_batches(tiny.make_student(), teacher, prompts=prompts, tokenizer=tokenizer)
    batch, _ = next(batches)
    begins = [[7, 8], [3, 9, 4], [9, 10], [11]]
    for ids, begin in zip(batch["input_ids"], begins, strict=True):
        assert ids[: len(begin)].tolist() == begin
    with pytest.raises(StopIteration):
        next(batches)
    with pytest.raises(InvalidRequest, match="prompt 0 is text, which needs a tokenizer"):
        next(make_batches(tiny.make_student(), teacher, prompts=prompts))


def test_a_student_without_a_stop_token_writes_to_the_end():
    student = tiny.make_student()
    student.generation_config.eos_token_id = None
    writer = Writer(student, None, OnPolicyArguments(max_new_tokens=9), num_ids=64, seed=0)
    texts = writer.write([torch.tensor([4, 5])] * 3, name="", version=0)
    assert (texts.num_written, texts.num_stopped, len(writer.untrained)) == (27, 0, 0)


class NoEvent:
    """Stands for a device's event on a CPU, where nothing has to be waited for."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def test_a_stop_that_is_noticed_one_pass_late_changes_nothing(monkeypatch):
    """As transformers generates on Apple's devices: the pass too many is seen, its token is not."""
    student = tiny.make_student()
    student.generation_config.eos_token_id = [*range(1, 32)]
    writer = Writer(student, None, OnPolicyArguments(max_new_tokens=30), num_ids=64, seed=0)
    prompts = [torch.tensor([50, 51]), torch.tensor([52])]
    found = [writer.write(prompts, name="", version=0)]
    assert found[0].num_stopped == 2
    watched = generation.DeferredStopCheck
    undone = []
    monkeypatch.setattr(watched, "is_supported", staticmethod(lambda *_, **__: True))
    monkeypatch.setattr(torch, "Event", NoEvent)
    finish = watched.finish
    monkeypatch.setattr(watched, "finish", lambda self: undone.append(finish(self)) or undone[-1])
    found.append(writer.write(prompts, name="", version=0))
    assert undone == [1]
    once, late = (texts.to_tensors() for texts in found)
    assert all(torch.equal(late[name], once[name]) for name in once)


def test_repetitions_are_runs_that_were_there_before():
    assert count_repetitions(torch.tensor([1, 2, 3])) == (0, 0)
    assert count_repetitions(torch.arange(10)) == (7, 0)
    assert count_repetitions(torch.tensor([1, 2, 3, 4, 1, 2, 3, 4])) == (5, 1)
    assert count_repetitions(torch.zeros(10)) == (7, 6)


def test_a_file_holds_what_was_written():
    writer = Writer(tiny.make_student(), None, OnPolicyArguments(), num_ids=VOCABULARY, seed=0)
    prompts = [torch.tensor([4, 5]), torch.tensor([6])]
    texts = writer.write(prompts, name="", version=7)
    again = WrittenTexts.of_tensors(texts.to_tensors())
    assert again.version == 7
    assert again.continues(prompts)
    assert not again.continues(prompts[::-1])
    for name, tensor in texts.to_tensors().items():
        assert torch.equal(tensor, again.to_tensors()[name])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"targets": "sampled"}, UnsuitableTargets, "reverse_kl cannot be estimated"),
        ({"targets": "features:layers=1"}, ValueError, "states of layers"),
        ({"support": 256}, ValueError, "support must be 1 to 255"),
        ({"max_staleness": -1}, ValueError, "max_staleness must be at least 0"),
        ({"sampling_temperature": -1}, ValueError, "sampling_temperature must be"),
        ({"max_new_tokens": 64}, ValueError, "the student takes 64 tokens"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(teacher, settings, error, message):
    with pytest.raises(error, match=message):
        make_batches(tiny.make_student(), teacher, **settings)


def test_a_student_that_cannot_write_is_refused(teacher):
    with pytest.raises(ValueError, match="Linear without generate"):
        make_batches(torch.nn.Linear(1, 1), teacher)
