"""Writes texts with a generator, as the scheduler does, one launch after another."""

from collections.abc import Sequence

from logit_codec import Targets
from teacher_server.engine.continuation import Continuation
from teacher_server.engine.generate import Generator
from teacher_server.engine.key_pool import pages_for


def grow(generator: Generator, text: Continuation, num_tokens: int) -> None:
    pages = generator.pool.take(pages_for(num_tokens) - len(text.pages))
    assert pages is not None
    text.pages += pages


def write(
    generator: Generator, texts: Sequence[Continuation], num_new: int = 40
) -> list[list[Targets]]:
    """Writes up to this many tokens of each text; returns the targets of those that are drawn."""
    while chunks := [(text, count) for text in texts if (count := generator.next_chunk(text))]:
        for text, count in chunks:
            grow(generator, text, text.num_cached + count)
        generator.result_of_chunks(generator.launch_chunks(chunks))
    found: list[list[Targets]] = [[] for _ in texts]
    while some := [i for i, text in enumerate(texts) if len(text.new_ids) < num_new]:
        for i in some:
            grow(generator, texts[i], texts[i].num_cached + 1)
        ids, rows, _ = generator.result_of_step(generator.launch_step([texts[i] for i in some]))
        for i, token_id, row in zip(some, ids, rows, strict=True):
            texts[i].new_ids.append(token_id)
            if row is not None:
                found[i].append(row.compact())
    return found


def give_back(generator: Generator, texts: Sequence[Continuation]) -> None:
    for text in texts:
        generator.pool.give_back(text.pages)
        text.pages.clear()
    assert generator.pool.num_free == generator.pool.num_pages
