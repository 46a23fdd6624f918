"""Writing texts, against transformers' own generate: tokens per second of the engine, targets included.

Both write the same number of tokens after the same prompts, in turns, with the same threads; the engine
keeps `sampled:64` targets of every token. The last column is the median of the turns' ratios.

    python -m benchmarks.generate [--rounds 5] [--threads 2] [--tokens 64] [--models small,large]
    python -m benchmarks.generate --products    what a product of 8 rows takes beside one of a single row
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from logit_codec import parse_targets
from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import Generator
from teacher_server.engine.key_pool import pages_for
from teacher_server.engine.loading import prepare
from teacher_server.engine.packed_weights import PackedProducts

MODELS = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 1024},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 32_000},
    "large": {"hidden_size": 1024, "num_hidden_layers": 16, "vocab_size": 32_000},
}
PROMPT_TOKENS = 32
SPEC = parse_targets("sampled:64")
SHAPES = ((512, 1536), (1536, 512), (512, 32_000), (2048, 5632))


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = MODELS[name]
    config = transformers.LlamaConfig(
        **shape,
        num_attention_heads=shape["hidden_size"] // 64,
        num_key_value_heads=shape["hidden_size"] // 128,
        intermediate_size=3 * shape["hidden_size"],
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def write_with_transformers(model: Any, prompts: Tensor, count: int) -> None:
    model.generate(
        prompts,
        max_new_tokens=count,
        do_sample=True,
        top_k=0,
        attention_mask=torch.ones_like(prompts),
    )


def write_with_engine(generator: Generator, prompts: Tensor, count: int) -> None:
    texts = [
        Continuation(prompt, DrawRule(sample=number), SPEC) for number, prompt in enumerate(prompts)
    ]
    rows = []
    for text in texts:
        pages = generator.pool.take(pages_for(len(text.prompt_ids) + count))
        assert pages is not None
        text.pages = pages
    while chunks := [(text, size) for text in texts if (size := generator.next_chunk(text))]:
        generator.result_of_chunks(generator.launch_chunks(chunks))
    for _ in range(count):
        token_ids, some, _ = generator.result_of_step(generator.launch_step(texts))
        rows.append(some)
        for text, token_id in zip(texts, token_ids, strict=True):
            text.new_ids.append(token_id)
    for step in rows:
        for row in step:
            assert row is not None
            row.compact()
    for text in texts:
        generator.pool.give_back(text.pages)


def measure(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(name: str, rounds: int, count: int) -> None:
    """Prints a line for one text and for eight."""
    model = make_model(name)
    generator = Engine(prepare(model)).open_generation(512 << 20)
    own: dict[int, list[float]] = {1: [], 8: []}
    for batch in own:
        prompts = torch.randint(model.config.vocab_size, (batch, PROMPT_TOKENS))
        theirs = []
        write_with_engine(generator, prompts, 2)
        for _ in range(rounds):
            their_s = measure(partial(write_with_transformers, model, prompts, count))
            own_s = measure(partial(write_with_engine, generator, prompts, count))
            theirs.append(batch * count / their_s)
            own[batch].append(batch * count / own_s)
        ratio = median(a / b for a, b in zip(own[batch], theirs, strict=True))
        print(
            f"{name:8}{batch:6}{median(theirs):16.0f}{median(own[batch]):12.0f}{ratio:9.2f}",
            flush=True,
        )
    print(
        f"{name:8}  8 texts at once write {median(own[8]) / median(own[1]):.1f} times as much as one"
    )


def compare_products() -> None:
    """Prints how long products of few rows take, in microseconds: the least of 9 turns."""
    print(f"{'inputs':>8}{'outputs':>9}{'1 row':>9}{'8 rows':>9}{'8 rows, ordered weights':>26}")
    for inputs, outputs in SHAPES:
        layer = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        one, eight = torch.randn(1, inputs), torch.randn(8, inputs)
        times: dict[str, list[float]] = {"one": [], "eight": [], "ordered": []}
        products = PackedProducts(_Holder(layer), 8)
        for turn in range(10):
            with products.use():
                ordered = measure(partial(layer, eight))
            if turn:  # the first one orders the weights
                times["one"].append(measure(partial(layer, one)))
                times["eight"].append(measure(partial(layer, eight)))
                times["ordered"].append(ordered)
        best = {name: 1e6 * min(seconds) for name, seconds in times.items()}
        print(f"{inputs:8}{outputs:9}{best['one']:9.0f}{best['eight']:9.0f}{best['ordered']:26.0f}")


class _Holder(nn.Module):
    """Looks like a model with a single layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.device = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--models", default="small,medium")
    parser.add_argument("--products", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.products:
        compare_products()
        return
    print(f"tokens per second, {options.threads} threads, {options.tokens} new tokens")
    print(f"{'model':8}{'texts':>6}{'transformers':>16}{'engine':>12}{'ratio':>9}")
    for name in options.models.split(","):
        compare(name, options.rounds, options.tokens)


if __name__ == "__main__":
    main()
