"""Several teachers, mixtures of them, and views: against what each teacher says of each text alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logit_codec import Targets
from student_trainer import (
    IncompatibleTeacher,
    InvalidRequest,
    LocalTeacher,
    Recorded,
    TeacherError,
    Teachers,
    distillation_loss,
    fused_distillation_loss,
)
from student_trainer.hf.alignment import Alignment
from student_trainer.teachers.view import divide_batch
from student_trainer.transfer import move_to_device
from tests.support import tiny
from tests.support.oracle import digest

VOCAB = 70
KINDS = (
    *("sampled:16", "top_k:8", "given_ids:bits=32", "realized", "dense", "hidden:int8"),
    "features:layers=1",
)
MIXED = ("top_k:8", "given_ids:bits=32", "realized", "dense", "dense:bf16", "hidden:bf16")
CANNOT = r"mixed on one row|a mixture of teachers has no ranks"
MARK = torch.tensor([5, 6, 7])
TOKENIZER = tiny.make_tokenizer([f"w{number}" for number in range(VOCAB - 2)])


@pytest.fixture(scope="module")
def alone() -> dict[str, LocalTeacher]:
    """By name, three teachers of 70 ids; the head of one is padded."""
    models = {
        "math": tiny.make_model("Llama", VOCAB, 1),
        "code": tiny.make_model("Gemma2", VOCAB, 2),
        "law": tiny.make_model("Llama", VOCAB, 3),
    }
    models["law"].resize_token_embeddings(80, mean_resizing=False)
    models["law"].config.vocab_size = 80
    return {name: LocalTeacher(model, TOKENIZER) for name, model in models.items()}


@pytest.fixture(scope="module")
def teachers(alone) -> Teachers:
    """The two whose heads have the same size."""
    return Teachers({name: alone[name] for name in ("math", "code")}, column="domain")


def make_batch(domain: Any, seed: int = 0) -> dict[str, Any]:
    """Four rows: padding on either side, a prompt that is not trained, two documents in one row."""
    ids = torch.randint(1, VOCAB, (4, 12), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, :3] = mask[1, 9:] = 0
    labels[2, :5] = -100
    positions = torch.arange(12).repeat(4, 1)
    positions[3, 7:] -= 7
    marks = {"attention_mask": mask, "labels": labels, "position_ids": positions}
    return {"input_ids": ids, **marks, "domain": domain}


def give_ids(batch: dict[str, Any]) -> Tensor:
    num_rows = sum(piece.num_rows for piece in divide_batch(batch, 0).values())
    return torch.arange(num_rows * 3).view(-1, 3) % VOCAB


def ask(teacher, batch, targets: str, **options: Any) -> Targets:
    if targets.startswith("given_ids"):
        options["given_ids"] = give_ids
    ((_, found),) = teacher.stream_batches([batch], targets=targets, ahead=2, **options)
    return found


def num_rows_of(batch: dict[str, Any]) -> list[int]:
    """Trained rows of each row of a batch."""
    counts = [0] * len(batch["input_ids"])
    for piece in divide_batch(batch, 0).values():
        counts[piece.batch_row] += piece.num_rows
    return counts


def rows_of(batch: dict[str, Any], wanted: int) -> slice:
    counts = num_rows_of(batch)
    return slice(sum(counts[:wanted]), sum(counts[: wanted + 1]))


def test_what_belongs_to_one_teacher_or_to_a_batch_says_so(alone, teachers):
    with pytest.raises(TeacherError, match=r"a head each: teachers\['math'\]"):
        teachers.head()
    batch = make_batch(["math", "code", "code", "math"])
    targets = ask(teachers, batch, "hidden:int8")
    logits, head = torch.zeros(targets.num_rows, VOCAB), alone["math"].head()
    with pytest.raises(ValueError, match="heads of several teachers already"):
        distillation_loss(logits, targets, teacher_head=head)
    with pytest.raises(InvalidRequest, match=r"is a function of the batch, .* got Tensor"):
        alone["math"].stream_batches([batch], targets="given_ids", given_ids=torch.zeros(3, 2))


@pytest.mark.parametrize("targets", KINDS)
def test_each_row_has_what_its_own_teacher_says(alone, teachers, targets):
    names = ["math", "code", "code", "math"]
    batch = make_batch(names)
    found = ask(teachers, batch, targets, seed=3)
    assert found.num_rows == sum(num_rows_of(batch))
    for row, name in enumerate(names):
        where = rows_of(batch, row)
        wanted = ask(alone[name], batch, targets, seed=3)[where]
        mine = found[where]
        if targets.startswith("hidden"):  # which have two heads here
            (share,) = [one for one in mine.shares if one.targets.num_rows]
            assert digest(replace(share.targets, realized_logprob=mine.realized_logprob)) == digest(
                wanted
            )
            torch.testing.assert_close(mine.logits(slice(None)), wanted.logits(slice(None)))
        else:
            assert digest(mine) == digest(wanted)


def test_who_is_asked_is_counted(alone, teachers):
    before = teachers.rows_by_teacher
    batch = make_batch(["math", {"math": 0.25, "code": 0.75}, "code", "code"])
    ask(teachers, batch, "realized")
    counts = num_rows_of(batch)
    math = counts[0] + counts[1] / 4
    after = teachers.rows_by_teacher
    assert after["math"] - before["math"] == math
    assert after["code"] - before["code"] == sum(counts) - math


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        (None, ["no column 'domain'", "'math', 'code'", "input_ids"]),
        (["math", "maths", "code", "code"], ["row 1", "'maths'", "'math', 'code'"]),
        (["math"] * 3, ["each of the 4 rows", "got 3"]),
        ([{"math": 0.5, "code": 0.6}] * 4, ["add up to 1"]),
        ([{"math": 1.5, "code": -0.5}] * 4, ["at least 0"]),
        ([7] * 4, ["name of a teacher", "7"]),
    ],
)
def test_a_row_without_a_known_teacher_is_refused(teachers, domain, words):
    with pytest.raises(InvalidRequest) as caught:
        ask(teachers, make_batch(domain), "realized")
    assert all(word in str(caught.value) for word in words)


def test_teachers_of_two_vocabularies_are_refused(alone):
    pair = {str(size): LocalTeacher(tiny.make_model("Llama", size)) for size in (70, 71)}
    with pytest.raises(IncompatibleTeacher, match=r"'70'.*'71'.*vocabularies: 70 and 71 ids"):
        Teachers(pair, column="domain")
    words = tiny.make_tokenizer(["a", "b"]), tiny.make_tokenizer(["b", "a"])
    pair = {str(i): LocalTeacher(tiny.make_model("Llama", 4), words[i]) for i in range(2)}
    prints = [one.info.tokenizer_fingerprint for one in pair.values()]
    with pytest.raises(IncompatibleTeacher, match=f"tokenizers: .*{prints[0]} and {prints[1]}"):
        Teachers(pair, column="domain")


def test_sequences_have_no_column(teachers, alone):
    with pytest.raises(InvalidRequest, match="stream_batches"):
        next(teachers.stream([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"either column=.* or weights=.*got neither"):
        Teachers(alone)
    with pytest.raises(ValueError, match="got both"):
        Teachers(alone, column="domain", weights={"code": 1.0})
    with pytest.raises(ValueError, match=r"'math' must be a Teacher, .*connect.* got str"):
        Teachers({"math": "localhost:50051"}, column="domain")  # type: ignore[dict-item]
    mixed = Teachers({"math": alone["math"], "code": alone["code"]}, weights={"code": 1.0})
    assert torch.equal(mixed.compute_logprobs([1, 2, 3]), alone["code"].compute_logprobs([1, 2, 3]))


def mixture(alone, batch, weights: list[dict[str, float]], temperature: float) -> Tensor:
    """(R, V) probabilities of the rows of a batch, from dense targets of each teacher alone."""
    dense = {
        name: ask(alone[name], batch, "dense", temperature=temperature).to_dense()[:, :VOCAB]
        for name in {name for one in weights for name in one}
    }
    parts = []
    for row, of_row in enumerate(weights):
        where = rows_of(batch, row)
        parts.append(sum(weight * dense[name][where] for name, weight in of_row.items()))
    return torch.cat(parts)


WEIGHTS = [{"math": 0.7, "code": 0.3}, {"math": 1.0}, {"code": 0.5, "math": 0.5}, {"code": 1.0}]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("targets", MIXED)
def test_a_mixture_is_the_weighted_sum_of_what_the_teachers_say(
    alone, teachers, targets, temperature
):
    batch = make_batch(WEIGHTS)
    found = ask(teachers, batch, targets, temperature=temperature)
    p_RV = mixture(alone, batch, WEIGHTS, temperature)
    labels = torch.cat(
        [piece.token_ids[piece.rows + 1] for piece in divide_batch(batch, 0).values()]
    )
    realized = p_RV.gather(1, labels[:, None])[:, 0].log()
    assert found.log_z is None
    torch.testing.assert_close(found.realized_logprob, realized, atol=2e-3, rtol=1e-3)
    if targets == "realized":
        return
    if targets.startswith("given_ids"):
        ids = give_ids(batch).sort(1).values
        torch.testing.assert_close(found.logprobs.view(-1, 3), p_RV.gather(1, ids).log())
        torch.testing.assert_close(found.tail_logprob.exp(), 1 - p_RV.gather(1, ids).sum(1))
        return
    if targets.startswith("top_k"):
        kept_RV = found.to_dense()
        tail = found.tail_logprob.exp()
        torch.testing.assert_close(kept_RV.sum(1) + tail, torch.ones(len(p_RV)))
        # Too low by no more than what a teacher without the id may give it; codes of 7 bits round.
        bounds = []
        for row, weights in enumerate(WEIGHTS):
            bound = torch.zeros(num_rows_of(batch)[row], VOCAB)
            for name, weight in weights.items():
                own = ask(alone[name], batch, targets, temperature=temperature)[rows_of(batch, row)]
                kept = own.to_dense()
                least = kept.masked_fill(kept == 0, 1.0).amin(1)
                most = torch.minimum(least, own.tail_logprob.exp())[:, None]
                bound += weight * most * (kept == 0)
            bounds.append(bound)
        bound_RV = torch.cat(bounds)
        lack_RV = (p_RV - kept_RV).where(kept_RV > 0, 0.0)
        assert (lack_RV <= bound_RV + 0.05 * p_RV).all()
        assert (lack_RV >= -0.05 * p_RV).all()
        return
    close = {"dense": 1e-6, "dense:bf16": 2e-2, "hidden:bf16": 2e-2}[targets]
    torch.testing.assert_close(found.to_dense(), p_RV, atol=close, rtol=close)


@pytest.mark.parametrize("targets", ["sampled", "features:layers=1", "given_ids:ranks=1"])
def test_what_cannot_be_mixed_is_refused_before_anything_is_asked(alone, teachers, targets):
    with pytest.raises(InvalidRequest, match=CANNOT):
        ask(teachers, make_batch(WEIGHTS), targets)
    pair = {"math": alone["math"], "code": alone["code"]}
    mixed = Teachers(pair, weights={"math": 0.7, "code": 0.3})
    with pytest.raises(InvalidRequest, match=CANNOT):
        mixed.stream([[1, 2]], targets=targets)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_both_losses_take_rows_of_several_heads(alone, teachers, divergence):
    """Rows of two heads and of a mixture give the loss and gradients of the dense mixture."""
    batch = make_batch(WEIGHTS)
    hidden = ask(teachers, batch, "hidden:bf16", temperature=1.7)
    dense = ask(teachers, batch, "dense", temperature=1.7)
    hidden_again = move_to_device(hidden, torch.device("cpu")).to("cpu")
    torch.manual_seed(0)
    states = torch.randn(dense.num_rows, 16, requires_grad=True)
    head = torch.randn(VOCAB, 16, requires_grad=True)
    for targets in (hidden, hidden_again):
        losses, gradients = [], []
        for given in (dense, targets):
            loss = distillation_loss(states @ head.T, given, divergence=divergence)
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss, (states, head)))
            fused = fused_distillation_loss(
                states, head, given, divergence=divergence, chunk_rows=7
            )
            torch.testing.assert_close(fused, loss)
            for mine, theirs in zip(
                torch.autograd.grad(fused, (states, head)), gradients[-1], strict=True
            ):
                torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-3)
        assert gradients[0][0].sub(gradients[1][0]).norm() < 0.02 * gradients[0][0].norm()
    order = torch.randperm(dense.num_rows)
    torch.testing.assert_close(hidden[order].to_dense(), hidden.to_dense()[order])
    mask = torch.arange(dense.num_rows) % 3 > 0
    masked = fused_distillation_loss(states, head, hidden, divergence=divergence, mask=mask)
    wanted = distillation_loss(
        (states @ head.T)[mask], hidden[mask.nonzero()[:, 0]], divergence=divergence
    )
    torch.testing.assert_close(masked, wanted)


@pytest.mark.parametrize("targets", ["top_k:8", "hidden:int8", "dense", "sampled", "realized"])
def test_heads_may_be_padded_differently(alone, targets):
    teachers = Teachers({"math": alone["math"], "law": alone["law"]}, column="domain")
    batch = make_batch(["law", "math", "law", "math"])
    found = ask(teachers, batch, targets)
    assert found.vocab_size == VOCAB
    wanted = ask(alone["law"], batch, targets)[rows_of(batch, 2)]
    mine = found[rows_of(batch, 2)]
    torch.testing.assert_close(mine.realized_logprob, wanted.realized_logprob)
    if targets != "realized":
        torch.testing.assert_close(mine.to_dense(), wanted.to_dense()[:, :VOCAB])


def test_each_teacher_has_a_record_of_its_own(alone, teachers, tmp_path: Path):
    with pytest.raises(ValueError, match="a record is of one teacher"):
        Recorded(tmp_path, teachers)
    batch = make_batch(["math", "code", "code", "math"])
    live = ask(teachers, batch, "top_k:8")
    for fallback in (alone, {"math": None, "code": None}):
        pair = {name: Recorded(tmp_path / name, fallback[name]) for name in ("math", "code")}
        with Teachers(pair, column="domain") as recorded:
            assert digest(ask(recorded, batch, "top_k:8")) == digest(live)
            fingerprint = recorded.info.teacher_fingerprint
            assert fingerprint == teachers.info.teacher_fingerprint
            assert all(f"{name}=" in fingerprint for name in pair)
            with pytest.raises(InvalidRequest, match="holds top_k"):
                ask(recorded, batch, "sampled")


def hint(ids: Tensor, row: dict[str, Any]) -> Tensor:
    """The ids behind a hint, which the batch has for each row."""
    return torch.cat([row.get("hint", MARK), ids])


@pytest.mark.parametrize("targets", KINDS)
def test_a_view_gives_what_the_teacher_says_of_the_other_text(alone, targets):
    batch = make_batch("math")
    hints = torch.arange(8, 16).view(4, 2)
    found = ask(alone["math"], {**batch, "hint": hints}, targets, seed=3, teacher_view=hint)
    first, given = 0, give_ids(batch)
    for piece in divide_batch(batch, 0).values():
        text = torch.cat([hints[piece.batch_row], piece.token_ids])
        options = {"targets": targets, "seed": 3}
        if targets.startswith("given_ids"):
            rows = torch.full((len(text) - 1, 3), -1)
            rows[:, 0] = 0
            rows[piece.rows + 2] = given[first : first + piece.num_rows]
            options["given_ids"] = [rows]
        ((_, wanted),) = alone["math"].stream([text], **options)
        mine = found[first : first + piece.num_rows]
        first += piece.num_rows
        assert digest(mine) == digest(wanted[piece.rows + 2])
    assert first == found.num_rows


VIEWS = {
    "longer": lambda ids, row: torch.cat([MARK, ids]),
    "shorter": lambda ids, row: ids[3:],
    "rows": lambda ids, row: (torch.cat([MARK, ids]), torch.arange(len(ids) - 1) + 3),
    "within": lambda ids, row: [*MARK.tolist(), *ids.tolist(), 3, 3],
    "other prompt": lambda ids, row: torch.cat([MARK, ids[4:]]),
}


@pytest.mark.parametrize("name", [*VIEWS])
def test_rows_are_found_in_the_teachers_text(name):
    ids = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    labels = torch.tensor([[-100, -100, -100, -100, 14, 15, -100, 17]])
    ((_, piece),) = divide_batch({"input_ids": ids, "labels": labels}, 0, VIEWS[name]).items()
    assert piece.token_ids[piece.rows + 1].tolist() == [14, 15, 17]


def test_what_a_users_function_raises_names_the_batch(alone):
    batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}

    def fail(*arguments):
        raise KeyError("hint")

    with pytest.raises(KeyError) as caught:
        divide_batch(batch, 4, fail, TOKENIZER)
    assert caught.value.__notes__ == ["raised by teacher_view for batch 4, row 0"]
    stream = alone["math"].stream_batches([batch], targets="given_ids", given_ids=fail)
    with pytest.raises(KeyError) as caught:
        next(iter(stream))
    assert caught.value.__notes__ == ["raised by given_ids for batch 0"]


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (lambda ids, row: ids.flip(0), ["token 4", "14 ('w12')", "13 ('w11')", "row 0"]),
        (lambda ids, row: ids[:3], ["token 4", "outside of its text"]),
        (lambda ids, row: torch.cat([ids, ids, MARK]), ["several times", "4 and 12"]),
        (
            lambda ids, row: ([*ids, 3], torch.arange(7) + 1),
            ["14 ('w12')", "15 ('w13')", "token 5"],
        ),
        (lambda ids, row: (ids, torch.arange(3)), ["7 whole numbers", "(3,)"]),
        (lambda ids, row: (ids, torch.full((7,), -1)), ["student's row 3", "-1"]),
        (lambda ids, row: (ids, ids, ids), ["got 3 values"]),
        (lambda ids, row: "text", ["what teacher_view returned", "str"]),
    ],
)
def test_a_view_of_other_tokens_is_refused_with_the_first_of_them(view, words):
    batch = {
        "input_ids": torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 14, 15, 16, 17]]),
    }
    with pytest.raises(InvalidRequest) as caught:
        divide_batch(batch, 0, view, TOKENIZER)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_record_is_of_what_the_teacher_reads(alone, tmp_path: Path):
    batch = make_batch("math")
    live = ask(alone["math"], batch, "top_k:8", teacher_view=hint)
    with Recorded(tmp_path, alone["math"]) as record:
        ask(record, batch, "top_k:8", teacher_view=hint)
    with Recorded(tmp_path) as record:
        assert digest(ask(record, batch, "top_k:8", teacher_view=hint)) == digest(live)
        piece = next(iter(divide_batch(batch, 0, hint).values()))
        assert record.has(piece.token_ids, rows=piece.rows)
        assert not record.has(piece.token_ids[len(MARK) :])


def test_the_alignment_is_checked_in_the_teachers_text(alone):
    batch = make_batch("math")
    targets = ask(alone["math"], batch, "top_k:8", teacher_view=hint)
    Alignment(hint).add(batch, targets)


def test_a_view_works_with_several_teachers_and_a_resume(alone, teachers):
    batches = [make_batch(["math", "code", "code", "math"], seed) for seed in range(3)]
    options = {"targets": "top_k:4", "teacher_view": hint, "ahead": 2}
    whole = [digest(targets) for _, targets in teachers.stream_batches(batches, **options)]
    stream = teachers.stream_batches(batches, **options)
    next(stream)
    again = teachers.stream_batches(batches, **options)
    again.load_state_dict(stream.state_dict())
    assert [digest(targets) for _, targets in again] == whole[1:]
