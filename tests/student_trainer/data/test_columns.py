"""Which tokens of a chat, a prompt with its completion, or a text a student is trained on."""

from typing import Any

import pytest
import torch

from student_trainer.data.columns import Columns, Document, DocumentReader
from student_trainer.teachers.layout import IGNORE_INDEX
from tests.support import tiny

WORDS = [
    "system",
    "user",
    "assistant",
    "tool",
    "tools",
    "call",
    "end",
    "be",
    "brief",
    "how",
    "warm",
    "is",
    "it",
    "weather",
    "paris",
    "21",
    "sunny",
]
TEMPLATE = (
    "{% if tools %}tools {% for one in tools %}{{ one.function.name }} {% endfor %}{% endif %}"
    "{% for one in messages %}{{ one.role }} {% if one.role == 'assistant' %}{% generation %}"
    "{{ one.content or '' }}{% for call in one.tool_calls or [] %}call {{ call.function.name }} "
    "{{ call.function.arguments.city }}{% endfor %} end{% endgeneration %}"
    "{% else %}{{ one.content }} end{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "paris"}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "how warm is it"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "21 sunny"},
    {"role": "assistant", "content": "it is 21"},
]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.fixture
def tokenizer():
    tokenizer = tiny.make_tokenizer(WORDS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(tokenizer: Any, row: dict[str, Any], trained_rows: str = "", column: str = "") -> Document:
    reader = DocumentReader(tokenizer)
    columns = Columns.find(row, "row 1", column, trained_rows)
    reader.check(columns)
    (document,) = reader.read([("row 1", row)], columns)
    return document


def trained(tokenizer: Any, document: Document) -> str:
    """What of a document is trained, as text."""
    assert document.labels is not None
    is_trained = document.labels != IGNORE_INDEX
    assert (document.labels == document.ids)[is_trained].all()
    return tokenizer.decode(document.ids[is_trained])


def test_of_a_chat_exactly_the_assistants_tokens_are_trained(tokenizer):
    document = read(tokenizer, {"messages": CHAT, "tools": TOOLS, "source": "web"})
    assert tokenizer.decode(document.ids) == (
        "tools weather system be brief end user how warm is it end assistant call weather paris end "
        "tool 21 sunny end assistant it is 21 end"
    )
    assert trained(tokenizer, document) == "call weather paris end it is 21 end"
    every = read(tokenizer, {"messages": CHAT, "tools": TOOLS}, "all")
    assert every.labels is None
    assert every.ids.tolist() == document.ids.tolist()


def test_nulls_that_arrow_fills_in_and_tools_as_json_change_nothing(tokenizer):
    filled = [{"tool_calls": None, "name": None, **message} for message in CHAT]
    tools = '[{"type": "function", "function": {"name": "weather"}}]'
    found = read(tokenizer, {"conversation": filled, "tools": tools}, column="conversation")
    expected = read(tokenizer, {"messages": CHAT, "tools": TOOLS})
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.labels.tolist() == expected.labels.tolist()


def test_a_template_that_does_not_mark_the_assistant_is_refused_with_what_to_do(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    with pytest.raises(ValueError, match=r"no \{% generation %\}.*--chat-template.*--trained-rows"):
        read(tokenizer, {"messages": CHAT})
    assert read(tokenizer, {"messages": CHAT}, "all").labels is None
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: give one, --chat-template"):
        read(tokenizer, {"messages": CHAT}, "all")


def test_of_a_prompt_with_its_completion_the_completion_is_trained(tokenizer):
    row = {"prompt": "how warm is it", "completion": " 21"}
    assert trained(tokenizer, read(tokenizer, row)) == "21 <eos>"
    assert read(tokenizer, row, "all").labels is None
    chat = {"prompt": CHAT[:2], "completion": CHAT[2:], "tools": TOOLS}
    assert trained(tokenizer, read(tokenizer, chat)) == (
        "call weather paris end tool 21 sunny end assistant it is 21 end"
    )
    only = trained(tokenizer, read(tokenizer, chat, "assistant"))
    assert only == "call weather paris end it is 21 end"


def test_a_token_of_prompt_and_completion_together_belongs_to_the_completion(tokenizer):
    document = read(tokenizer, {"prompt": "it is sun", "completion": "ny"})
    assert trained(tokenizer, document) == "sunny <eos>"


def test_ids_and_their_labels_are_taken_as_they_are(tokenizer):
    row = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    document = read(tokenizer, row)
    assert document.ids.tolist() == [3, 4, 5]
    assert document.labels.tolist() == [-100, 4, 5]
    assert read(tokenizer, row, "all").labels is None
    for wrong in ([3, -1], [3, 2**31], [0.5, 1.0], [[1], [2]]):
        with pytest.raises(ValueError, match=r"row 1: (token ids|ids)"):
            read(tokenizer, {"input_ids": wrong})


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"story": "x", "id": 1}, {}, "columns are story, id. Name .* --text-column"),
        ({"text": "x", "messages": CHAT}, {}, "text and messages, and only one"),
        ({"story": "x"}, {"column": "tale"}, "no column 'tale'; it has story"),
        ({"text": "x"}, {"trained_rows": "assistant"}, "--trained-rows assistant does not fit"),
        ({"text": "x"}, {"trained_rows": "completion"}, "there it can be all"),
        ({"messages": CHAT}, {"trained_rows": "completion"}, "it can be assistant or all"),
        ({"id": 5}, {"column": "id"}, "must hold text, a list of messages"),
        ({"prompt": "x", "completion": CHAT}, {}, "both be text or both be lists"),
        ({"messages": [{"content": "x"}], "text_": ""}, {}, "the chat template cannot write"),
    ],
)
def test_columns_that_cannot_be_read_are_listed(tokenizer, row, options, words):
    tokenizer.chat_template = TEMPLATE.replace("one.role }}", "one['role'] + '' }}")
    with pytest.raises(ValueError, match=words):
        read(tokenizer, row, **options)


def test_texts_are_tokenized_as_each_alone(tokenizer):
    texts = [" ".join(WORDS[: 1 + n % 7]) for n in range(600)]
    reader = DocumentReader(tokenizer)
    rows = [(f"row {n}", {"text": text}) for n, text in enumerate(texts)]
    found = reader.read(rows, Columns("text", ("text",), "all"))
    for text, document in zip(texts, found, strict=True):
        assert document.ids.tolist() == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert torch.is_tensor(torch.as_tensor(document.ids))
