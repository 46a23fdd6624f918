"""Writing texts: the same tokens as transformers, the right distribution, the same bits in any company."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from logit_codec import Targets, encode, parse_targets
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.drawing import BLOCK, draw, keys_of
from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import CHUNK_TOKENS, CannotGenerate, Generator
from teacher_server.engine.key_pool import PAGE_TOKENS
from teacher_server.engine.loading import prepare
from tests.support import tiny
from tests.support.written import give_back, write

VOCAB = 101
GREEDY = DrawRule(temperature=0.0)
POOL_NBYTES = 8 << 20
LENGTHS = (5, 1, 40, 64, 90, 2, 65, 130, 17)
"""Of the prompts: below, at and above the bounds of pages, tiles and windows."""
NUM_NEW = 40


def open_generator(name: str, dtype: torch.dtype = torch.float32) -> tuple[Engine, Generator]:
    engine = Engine(prepare(tiny.make_model(name, VOCAB).to(dtype)))
    return engine, engine.open_generation(POOL_NBYTES)


def make_prompts(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, "GptOss"])
def test_the_likeliest_tokens_are_those_of_transformers(name):
    model = tiny.make_model(name, VOCAB)
    prompts = make_prompts()
    expected = [
        model.generate(
            prompt[None],
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            attention_mask=torch.ones_like(prompt[None]),
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    generator = Engine(prepare(model)).open_generation(POOL_NBYTES)
    texts = [Continuation(prompt, GREEDY) for prompt in prompts]
    write(generator, texts)
    assert [text.new_ids for text in texts] == expected
    give_back(generator, texts)


def test_a_prompt_of_several_chunks_is_that_of_transformers():
    model = tiny.make_model("Gemma2", VOCAB, context=2048)
    (prompt,) = make_prompts([2 * CHUNK_TOKENS + 77])
    expected = model.generate(
        prompt[None],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        attention_mask=torch.ones_like(prompt[None]),
    )[0, len(prompt) :].tolist()
    generator = Engine(prepare(model)).open_generation(POOL_NBYTES)
    text = Continuation(prompt, GREEDY)
    write(generator, [text], 8)
    assert text.new_ids == expected


def draw_of(logits: Tensor, texts: list[Continuation]) -> Tensor:
    return draw(logits, texts, keys_of(texts))


EXACT = [name for name in tiny.ARCHITECTURES if name != "Mixtral"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", EXACT)
def test_a_text_has_the_same_bits_alone_among_others_and_after_it_was_interrupted(name, dtype):
    _, generator = open_generator(name, dtype)
    prompts = make_prompts()
    spec = parse_targets("sampled:16,log_z=1,entropy=1")

    def write_some(order: Sequence[int], kept: Sequence[int] = ()) -> list[tuple[list[int], list]]:
        texts = [
            Continuation(prompts[i], DrawRule(seed=3), spec, new_ids=list(kept)) for i in order
        ]
        targets = write(generator, texts)
        give_back(generator, texts)
        return [
            (text.new_ids, [encode(row) for row in rows])
            for text, rows in zip(texts, targets, strict=True)
        ]

    everyone = write_some(range(len(prompts)))
    among = write_some([7, 2, 0])
    assert among == [everyone[i] for i in (7, 2, 0)]
    for i in (1, 4, 7):
        assert write_some([i]) == [everyone[i]]
    ids, rows = everyone[7]
    for done in (1, 23, 39):
        assert write_some([7], ids[:done]) == [(ids, rows[done:])]


@pytest.mark.parametrize("name", ["Gemma2", "Llama", "GPT2", "Mixtral", "Gemma3"])
@pytest.mark.parametrize(
    "spec",
    ["top_k:8,bits=16,entropy=1", "dense:f32", "realized", "hidden:bf16", "features:layers=0+1+2"],
)
def test_targets_are_those_that_a_scoring_of_the_whole_text_gives(name, spec):
    engine, generator = open_generator(name)
    kind = engine.model.complete(parse_targets(spec))
    texts = [
        Continuation(prompt, DrawRule(seed=5, temperature=0.7), kind, target_temperature=1.3)
        for prompt in make_prompts()
    ]
    for text, rows in zip(texts, write(generator, texts, 12), strict=True):
        written = Targets.cat(rows)
        whole = torch.cat([text.prompt_ids, torch.tensor(text.new_ids)])
        wanted = torch.arange(len(text.prompt_ids) - 1, len(whole) - 1)
        (scored,) = engine.score([RowRequest(whole, wanted, kind, 1.3)])
        assert written.temperature == scored.temperature
        theirs = scored._tensors()
        for field, mine in written._tensors().items():
            if mine.is_floating_point():
                error = 0.02 if mine.dtype == torch.bfloat16 else 1e-5
                assert torch.allclose(mine.float(), theirs[field].float(), rtol=error, atol=error)
            else:
                assert torch.equal(mine, theirs[field])


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"top_k": 9, "top_p": 0.7, "temperature": 1.5},
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_the_rule(rule):
    torch.manual_seed(0)
    vocab, count = 2 * BLOCK + 50, 20_000
    logits = (torch.randn(vocab) * 2.5)[None]
    expected = make_probabilities(logits[0], **rule)
    prompt = torch.tensor([4, 2])
    drawn = torch.cat(
        [
            draw_of(
                logits.expand(500, -1),
                [
                    Continuation(prompt, DrawRule(**{"sample": i, **rule}))
                    for i in range(first, first + 500)
                ],
            )
            for first in range(0, count, 500)
        ]
    )
    counts = torch.bincount(drawn, minlength=vocab).double()
    assert counts[expected == 0].sum() == 0
    often = expected * count >= 5
    cells = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]) * count
    kept = wanted > 0
    chi_square = ((cells - wanted)[kept] ** 2 / wanted[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def make_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The exact distribution, one id at a time."""
    scaled = logits.double() / temperature
    order = scaled.argsort(descending=True).tolist()
    kept = order[:top_k] if top_k else order
    masses = scaled[kept].softmax(0)
    some, total = [], 0.0
    for token_id, mass in zip(kept, masses.tolist(), strict=True):
        if total >= top_p:
            break
        some.append(token_id)
        total += mass
    found = torch.zeros(len(logits), dtype=torch.float64)
    found[some] = scaled[some].softmax(0)
    return found


def test_places_and_samples_draw_independently():
    logits = torch.zeros(1, 3000)
    prompt = torch.tensor([1, 2, 3])
    texts = [Continuation(prompt, DrawRule(sample=i)) for i in range(50)]
    later = [Continuation(prompt, DrawRule(sample=i), new_ids=[9]) for i in range(50)]
    other = [Continuation(prompt, DrawRule(seed=1, sample=i)) for i in range(50)]
    draws = [draw_of(logits.expand(50, -1), some).tolist() for some in (texts, later, other)]
    assert len({token_id for some in draws for token_id in some}) > 140
    assert draw_of(logits.expand(50, -1), texts).tolist() == draws[0]


def test_padding_of_the_head_is_never_drawn():
    model = tiny.make_model("Llama", VOCAB)
    prepared = prepare(model, tiny.make_tokenizer([f"w{i}" for i in range(5)]))
    assert prepared.effective_vocab_size == 7
    generator = Engine(prepared).open_generation(POOL_NBYTES)
    texts = [Continuation(torch.tensor([3]), DrawRule(sample=i, temperature=5.0)) for i in range(9)]
    write(generator, texts)
    assert max(max(text.new_ids) for text in texts) < 7


def test_pages_are_counted():
    _, generator = open_generator("Llama")
    pool = generator.pool
    first = pool.take(3)
    assert first is not None
    assert pool.take(pool.num_pages) is None
    pool.share(first[:2])
    pool.give_back(first)
    assert pool.num_free == pool.num_pages - 2
    pool.give_back(first[:2])
    assert pool.num_free == pool.num_pages
    with pytest.raises(ValueError, match="nobody uses"):
        pool.give_back(first[:1])
    with pytest.raises(ValueError, match="nobody uses"):
        pool.share(first[:1])
    assert pool.max_tokens == pool.num_pages * PAGE_TOKENS


def test_what_a_broken_text_left_in_its_pages_harms_nobody():
    _, generator = open_generator("Llama")
    (prompt,) = make_prompts([70])
    text = Continuation(prompt, DrawRule(seed=2))
    write(generator, [text])
    give_back(generator, [text])
    for kept in (*generator.pool.keys, *generator.pool.values):
        kept.fill_(torch.nan)
    again = Continuation(prompt, DrawRule(seed=2))
    write(generator, [again])
    assert again.new_ids == text.new_ids


def test_who_cannot_write_says_why():
    model = prepare(tiny.make_model("Llama", VOCAB), packed=False)
    with pytest.raises(CannotGenerate, match="LlamaForCausalLM"):
        Engine(model).open_generation(POOL_NBYTES)
    with pytest.raises(ValueError, match="hold no page"):
        Engine(prepare(tiny.make_model("Llama", VOCAB))).open_generation(10)


def test_texts_are_written_with_the_weights_that_the_model_has_now():
    (prompt,) = make_prompts([40])
    engine, generator = open_generator("Llama")
    before = Continuation(prompt, GREEDY)
    write(generator, [before])
    other = tiny.make_model("Llama", VOCAB, seed=3)
    engine.model.causal_lm.load_state_dict(other.state_dict())
    after = Continuation(prompt, GREEDY)
    write(generator, [after])
    expected = Continuation(prompt, GREEDY)
    write(Engine(prepare(other)).open_generation(POOL_NBYTES), [expected])
    assert after.new_ids == expected.new_ids != before.new_ids


def test_a_forward_that_a_layer_has_of_its_own_is_called_and_stays():
    (prompt,) = make_prompts([20])
    engine, generator = open_generator("Llama")
    layer = engine.model.causal_lm.base_model.layers[0].mlp.up_proj
    calls = []
    own = type(layer).forward

    def forward(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return own(layer, rows)

    layer.forward = forward
    write(generator, [Continuation(prompt, GREEDY)], 5)
    assert len(calls) == 6, "a chunk of the prompt, and 5 tokens"
    assert layer.__dict__["forward"] is forward


def test_a_few_texts_take_a_launch_of_a_few_rows_with_the_same_bits():
    engine, generator = open_generator("Llama")
    sizes = generator._products.sizes
    assert sizes[-1] == generator.decode_rows
    if len(sizes) == 1:
        pytest.skip("on this processor products of fewer rows round differently")
    assert sizes == (2, 4, 8)
    seen = []
    with engine.model.causal_lm.base_model.norm.register_forward_hook(
        lambda _module, _args, output: seen.append(output.shape[1])
    ):
        found = []
        for count in (1, 2, 3, 7, 8, 9):
            seen.clear()
            prompts = make_prompts([5] * count)
            texts = [Continuation(prompt, GREEDY, parse_targets("top_k:8")) for prompt in prompts]
            targets = write(generator, texts, 6)
            found.append((texts[0].new_ids, [encode(one) for one in targets[0]]))
            steps = {1: [2], 2: [2], 3: [4], 7: [8], 8: [8], 9: [8, 2]}[count]
            assert seen[1:] == steps * 6, "after the chunk of the prompts"
            give_back(generator, texts)
    assert all(one == found[0] for one in found)
