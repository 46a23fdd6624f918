"""When a text ends."""

import pytest
import tokenizers
import torch
import transformers

from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.stops import StopRule
from tests.support import tiny


def text(new_ids: list[int]) -> Continuation:
    return Continuation(torch.tensor([5, 6]), DrawRule(), new_ids=new_ids)


def bytes_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each byte, so that characters of several bytes end in their last token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    one = tokenizers.Tokenizer(
        tokenizers.models.BPE({char: index for index, char in enumerate(alphabet)}, [])
    )
    one.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=one)


def end_of(rule: StopRule, ids: list[int]) -> tuple[int, str]:
    """How many tokens are written before the rule ends the text, and what it says."""
    for count in range(1, len(ids) + 1):
        if said := rule.check(text(ids[:count])):
            return count, said
    return 0, ""


def test_a_text_ends_at_a_stop_id_or_at_its_length_and_the_stop_id_comes_first():
    rule = StopRule({7, 9}, (), 3, None)
    assert end_of(rule, [1, 9, 7]) == (2, "stop")
    assert end_of(rule, [1, 2, 3]) == (3, "length")
    assert end_of(rule, [1, 2, 7]) == (3, "stop")
    assert rule.check(text([])) == ""


@pytest.mark.parametrize("stop", ["b.", "ü\n", "x", "日本"])
def test_a_text_ends_with_the_token_that_completes_a_stop_string(stop: str):
    tokenizer = bytes_tokenizer()
    written = "aaaaaaaaaaaaaaaa bü b日 " + stop + stop + " more"
    ids = tokenizer(written)["input_ids"]
    wanted = len((written.partition(stop)[0] + stop).encode())
    assert end_of(StopRule((), ("never", stop), 1000, tokenizer), ids) == (wanted, "stop")


def test_a_stop_string_within_one_token_or_across_words_is_found():
    tokenizer = tiny.make_tokenizer(["one", "two", "three"])
    one, two, three = (tokenizer(word)["input_ids"][0] for word in ("one", "two", "three"))
    assert end_of(StopRule((), ("wo thr",), 10, tokenizer), [one, three, two, three, one]) == (
        4,
        "stop",
    )
    assert end_of(StopRule((), ("hre",), 10, tokenizer), [one, three, two]) == (2, "stop")
    special = tokenizer.eos_token_id
    assert end_of(StopRule((), ("<eos>",), 10, tokenizer), [one, special, two]) == (2, "stop")


def test_what_cannot_be_found_is_refused():
    with pytest.raises(ValueError, match="has none: use stop ids"):
        StopRule((), ("x",), 10, None)
    with pytest.raises(ValueError, match="at least one character"):
        StopRule((), ("x", ""), 10, tiny.make_tokenizer(["x"]))
