"""Texts of a teacher in this process, and what `generate` refuses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from logit_codec import decode_parts
from student_trainer.errors import IncompatibleTeacher, InvalidRequest, TeacherOverloaded
from student_trainer.teachers.generation import Generation
from student_trainer.teachers.local import LocalTeacher
from student_trainer.teachers.several import Teachers
from tests.support import tiny

VOCAB = 300
LENGTHS = (1, 5, 64, 65, 130, 40)
EXACT = {("dense", "logprobs"), ("realized", "realized_logprob")}
"""What is not rounded to 16 bits or fewer on the way."""
PROMPTS = [
    torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(length))
    for length in LENGTHS
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("Llama", VOCAB)


@pytest.fixture(scope="module")
def teacher(model: Any) -> LocalTeacher:
    return LocalTeacher(model)


def texts(generations: Iterator[Generation]) -> list[tuple[int, int, list[int]]]:
    return [(one.index, one.sample, one.token_ids.tolist()) for one in generations]


def greedy(model: Any, prompt: Tensor, count: int) -> list[int]:
    """What transformers writes."""
    written = model.generate(
        prompt[None], max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return written[0, len(prompt) :].tolist()


def test_the_likeliest_tokens_are_those_of_transformers(model: Any, teacher: LocalTeacher):
    found = list(
        teacher.generate(PROMPTS, max_new_tokens=20, temperature=0, ignore_teacher_stop_ids=True)
    )
    assert [one.index for one in found] == list(range(len(PROMPTS)))
    for one, prompt in zip(found, PROMPTS, strict=True):
        assert torch.equal(one.prompt_ids, prompt)
        assert one.token_ids.tolist() == greedy(model, prompt, 20)
        assert one.finish == "length"
        assert one.targets is not None
        assert one.targets.num_rows == 20


@pytest.mark.parametrize(
    "kind", ["sampled:16", "top_k:8", "dense", "realized", "hidden:bf16", "features:layers=0+2"]
)
def test_targets_are_those_of_the_finished_text(teacher: LocalTeacher, kind: str):
    prompts = PROMPTS[1:4]
    written = list(teacher.generate(prompts, max_new_tokens=70, targets=kind, seed=3))
    for one in written:
        whole = torch.cat([one.prompt_ids, one.token_ids])
        ((_, scored),) = teacher.stream([whole], targets=kind, seed=3)
        wanted = scored[len(one.prompt_ids) - 1 :]
        assert one.targets is not None
        assert one.targets.num_rows == len(one.token_ids) == wanted.num_rows
        assert type(one.targets) is type(wanted)
        for name in ("realized_logprob", "logprobs", "hidden"):
            mine, theirs = (getattr(each, name, None) for each in (one.targets, wanted))
            if isinstance(mine, Tensor):
                differences = (mine.float() - theirs.float()).abs()
                # Rounding to 16 bits falls on the other side where a value is in the middle.
                assert differences.max() < (1e-5 if (kind, name) in EXACT else 2e-2)
                assert differences.mean() < 5e-4
        realized = decode_parts(one.payloads).realized_logprob
        if realized is not None:
            assert torch.equal(one.targets.realized_logprob, realized)


def test_samples_of_a_prompt_differ_and_are_the_same_in_any_company(teacher: LocalTeacher):
    together = texts(teacher.generate(PROMPTS, max_new_tokens=24, num_samples=3, seed=5))
    assert [key[:2] for key in together] == [
        (index, sample) for index in range(len(PROMPTS)) for sample in range(3)
    ]
    alone = [
        text
        for prompt in PROMPTS
        for text in texts(teacher.generate([prompt], max_new_tokens=24, num_samples=3, seed=5))
    ]
    assert [ids for _, _, ids in together] == [ids for _, _, ids in alone]
    assert len({tuple(ids) for _, _, ids in together}) == len(together)
    first = texts(teacher.generate(PROMPTS, max_new_tokens=24, seed=5))
    assert first == [text for text in together if text[1] == 0]
    other = texts(teacher.generate(PROMPTS, max_new_tokens=24, seed=6))
    assert all(mine[2] != theirs[2] for mine, theirs in zip(first, other, strict=True))


def test_a_text_ends_with_its_stop_id_and_the_teachers_own_can_be_ignored(
    model: Any, teacher: LocalTeacher
):
    prompt = PROMPTS[1]
    likeliest = greedy(model, prompt, 20)
    stop = next(one for one in likeliest[4:] if one not in likeliest[:4])
    count = likeliest.index(stop) + 1
    (one,) = teacher.generate(
        [prompt.tolist()], max_new_tokens=20, temperature=0, stop_ids=[stop], targets="top_k:4"
    )
    assert (one.token_ids.tolist(), one.finish) == (likeliest[:count], "stop")
    assert one.targets is not None
    assert one.targets.num_rows == count

    stopping = tiny.make_model("Llama", VOCAB)
    stopping.generation_config.eos_token_id = [stop, 299]
    own = LocalTeacher(stopping)
    assert list(own.info.stop_ids) == sorted([stop, 299])
    (one,) = own.generate([prompt], max_new_tokens=20, temperature=0, targets=None)
    assert (one.token_ids.tolist(), one.finish) == (likeliest[:count], "stop")
    assert one.targets is None
    assert one.payloads == ()
    (one,) = own.generate(
        [prompt], max_new_tokens=20, temperature=0, targets=None, ignore_teacher_stop_ids=True
    )
    assert (one.token_ids.tolist(), one.finish) == (likeliest, "length")


def test_a_text_ends_with_the_token_that_completes_a_stop_string():
    model = tiny.make_model("Llama", 64)
    words = [f"w{index}" for index in range(62)]
    named = LocalTeacher(model, tiny.make_tokenizer(words))
    prompt = torch.tensor([5, 6, 7])
    likeliest = greedy(model, prompt, 20)
    text = named.tokenizer.decode(likeliest[3:5])
    (one,) = named.generate(
        [prompt],
        max_new_tokens=20,
        temperature=0,
        stop_strings=["never", text],
        ignore_teacher_stop_ids=True,
    )
    assert one.finish == "stop"
    assert text in named.tokenizer.decode(one.token_ids)
    assert text not in named.tokenizer.decode(one.token_ids[:-1])


def test_prompts_are_pulled_as_texts_are_handed_out(teacher: LocalTeacher):
    pulled = []

    def source() -> Iterator[Tensor]:
        for number, prompt in enumerate(PROMPTS):
            pulled.append(number)
            yield prompt

    stream = teacher.generate(source(), max_new_tokens=4, ahead=2)
    assert pulled == []
    assert next(stream).index == 0
    assert len(pulled) == 2
    assert next(stream).index == 1
    assert len(pulled) <= 4
    stream.close()
    assert len(pulled) <= 4


def test_texts_can_come_as_they_end(model: Any, teacher: LocalTeacher):
    likeliest = [greedy(model, prompt, 12) for prompt in PROMPTS]
    stop = likeliest[2][0]
    found = list(
        teacher.generate(
            PROMPTS, max_new_tokens=12, temperature=0, stop_ids=[stop], as_finished=True
        )
    )
    assert found[0].index == 2, "it ends with its first token"
    assert sorted(one.index for one in found) == list(range(len(PROMPTS)))


def test_more_texts_than_there_is_memory_for_wait_and_all_pages_come_back(model: Any):
    small = LocalTeacher(model, keys_mib=1)
    wanted = LocalTeacher(model)
    most = small.info.max_generation_tokens
    assert most == wanted.info.max_generation_tokens == tiny.CONTEXT
    arguments: dict[str, Any] = {"max_new_tokens": 90, "num_samples": 8, "ahead": 48}
    assert texts(small.generate(PROMPTS, **arguments)) == texts(
        wanted.generate(PROMPTS, **arguments)
    )
    pool = small._generator.pool  # type: ignore[union-attr]
    assert pool.num_pages < len(PROMPTS) * 8, "the test's pool is too large to show anything"
    assert pool.num_free == pool.num_pages
    stream = small.generate(PROMPTS, max_new_tokens=9, ahead=2)
    next(stream)
    stream.close()
    assert pool.num_free == pool.num_pages
    held = pool.take(pool.num_pages - 1)
    with pytest.raises(TeacherOverloaded, match="close the iterators"):
        next(small.generate([PROMPTS[0]], max_new_tokens=255))
    pool.give_back(held)
    assert len(list(small.generate(PROMPTS, max_new_tokens=3))) == len(PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "arguments", "says"),
    [
        ("once upon", {}, "prompts must be a list of sequences of token ids, got 'once upon'"),
        (["once upon"], {}, "got the string 'once upon': use tokenizer"),
        ([[5], []], {}, "prompt 1 has 0 tokens"),
        ([5, 6], {}, "prompt 0 must be one row"),
        ([[5, VOCAB]], {}, "prompt 0: ids are 0 to 299, got 300"),
        ([[5] * 250], {}, "it may have 246"),
        ([[5]], {"max_new_tokens": 256}, "at most 255"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1"),
        ([[5]], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ([[5]], {"num_samples": 0}, "num_samples"),
        ([[5]], {"seed": -1}, "seed"),
        ([[5]], {"temperature": 1e-9}, "temperature must be 0 or"),
        ([[5]], {"target_temperature": -1}, "target_temperature must be 0 or"),
        ([[5]], {"top_p": 0}, "top_p must be above 0"),
        ([[5]], {"top_k": -1}, "top_k"),
        ([[5]], {"stop_ids": 5}, r"use \[5\]"),
        ([[5]], {"stop_ids": [VOCAB]}, "stop_ids are 0 to 299"),
        ([[5]], {"stop_strings": "x"}, r"use \['x'\]"),
        ([[5]], {"stop_strings": [""]}, "at least one character"),
        ([[5]], {"stop_strings": ["x"]}, "has none: use stop ids"),
        ([[5]], {"targets": "given_ids"}, "nobody knows before it is written"),
        ([[5]], {"targets": "top_kk"}, "top_kk"),
        ([[5]], {"targets": "features:layers=9"}, "layers 0"),
        ([[5]], {"ahead": 0}, "ahead"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_asked(
    teacher: LocalTeacher, prompts: Any, arguments: dict[str, Any], says: str
):
    with pytest.raises(InvalidRequest, match=says):
        teacher.generate(prompts, **{"max_new_tokens": 10, **arguments})


def test_a_wrong_prompt_of_an_iterator_comes_behind_the_texts_before_it(teacher: LocalTeacher):
    stream = teacher.generate(iter([[5], [6, 7], [5, 999], [8]]), max_new_tokens=3)
    assert [next(stream).index for _ in range(2)] == [0, 1]
    with pytest.raises(InvalidRequest, match="prompt 2: ids are"):
        next(stream)


def test_teachers_that_write_nothing_say_so(teacher: LocalTeacher):
    model = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    )
    padded = LocalTeacher(model.eval())
    assert padded.info.max_generation_tokens == 0
    with pytest.raises(IncompatibleTeacher, match="writes no texts, it only scores"):
        padded.generate([[5]], max_new_tokens=3)
    both = Teachers({"a": teacher, "b": teacher}, weights={"a": 1.0})
    with pytest.raises(IncompatibleTeacher, match=r"use one of them: teachers\[name\].generate"):
        both.generate([[5]], max_new_tokens=3)
