import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from logit_codec import tokenizer_fingerprint

WORDS = ("<unk>", "a", "b", "é", "\n", "Ġthe")


def make_tokenizer(words=WORDS, special=("<s>", "</s>"), plain=()) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(plain))
    return tokenizer


def of_transformers(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def test_a_fingerprint_is_64_hexadecimal_digits_and_does_not_change_between_releases():
    fingerprint = tokenizer_fingerprint(make_tokenizer())
    assert fingerprint == "55652a2f09531486408cf2be1315e182c9862ade64b8222f88255620afa7834c"


def test_tokenizers_and_transformers_agree_on_the_same_vocabulary():
    ours = make_tokenizer()
    theirs = of_transformers(make_tokenizer(), bos_token="<s>", eos_token="</s>")
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs)
    assert tokenizer_fingerprint(theirs) == tokenizer_fingerprint(theirs.backend_tokenizer)


def test_they_agree_without_special_tokens_and_with_ordinary_added_ones():
    for options in ({"special": ()}, {"special": (), "plain": ("<code>", "<table>")}):
        ours = make_tokenizer(**options)
        theirs = of_transformers(make_tokenizer(**options))
        assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs)


def test_they_agree_when_a_special_token_has_no_name_in_transformers():
    """As the 250 reserved tokens of Llama 3, which are special but neither bos nor eos."""
    ours = make_tokenizer(special=("<s>", "</s>", "<reserved_0>"))
    theirs = of_transformers(ours, bos_token="<s>", eos_token="</s>")
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs)


def test_the_order_in_which_tokens_were_listed_does_not_matter():
    listed = {word: i for i, word in enumerate(WORDS)}
    backwards = dict(reversed(listed.items()))
    assert tokenizer_fingerprint(
        Tokenizer(models.WordLevel(listed, unk_token="<unk>"))
    ) == tokenizer_fingerprint(Tokenizer(models.WordLevel(backwards, unk_token="<unk>")))


def test_a_fingerprint_changes_with_a_token_an_id_or_a_special_id():
    different = [
        make_tokenizer(),
        make_tokenizer(words=("<unk>", "a", "c", "é", "\n", "Ġthe")),  # another token
        make_tokenizer(words=("<unk>", "b", "a", "é", "\n", "Ġthe")),  # two ids swapped
        make_tokenizer(words=WORDS[:-1]),  # one token fewer
        make_tokenizer(plain=("<code>",)),  # one more
        make_tokenizer(special=("<s>",), plain=("</s>",)),  # the same tokens, one not special
    ]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in different}) == len(different)
    named = [
        of_transformers(make_tokenizer(), bos_token="<s>", eos_token="</s>"),
        of_transformers(make_tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="<unk>"),
        of_transformers(make_tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="a"),
        of_transformers(make_tokenizer(special=("<s>",), plain=("</s>",)), bos_token="<s>"),
    ]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in named}) == len(named)


def test_a_word_of_the_vocabulary_that_is_given_a_special_name_becomes_special():
    """transformers marks it as an added special token, in the tokenizer of tokenizers as well."""
    theirs = of_transformers(make_tokenizer(), eos_token="a")
    assert theirs.added_tokens_decoder[1].special
    assert tokenizer_fingerprint(theirs) != tokenizer_fingerprint(make_tokenizer())
    assert tokenizer_fingerprint(theirs) == tokenizer_fingerprint(theirs.backend_tokenizer)


def test_which_name_a_special_token_has_does_not_matter():
    ours = tokenizer_fingerprint(make_tokenizer())
    for names in ({}, {"bos_token": "<s>"}, {"eos_token": "<s>", "pad_token": "</s>"}):
        assert tokenizer_fingerprint(of_transformers(make_tokenizer(), **names)) == ours


def test_how_text_is_split_is_not_part_of_the_fingerprint():
    """The ids travel, not the text: what an added token strips changes no id's meaning."""
    other = make_tokenizer(special=())
    other.add_special_tokens([AddedToken("<s>", lstrip=True), AddedToken("</s>", rstrip=True)])
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(make_tokenizer())


def test_anything_else_is_refused_by_its_type():
    with pytest.raises(ValueError, match=r"tokenizer of transformers or tokenizers.*got dict"):
        tokenizer_fingerprint({"a": 0})
