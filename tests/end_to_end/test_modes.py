"""The examples of docs/modes.md, run as they are printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer import LocalTeacher
from tests.support import tiny

PAGE = Path(__file__).parents[2] / "docs" / "modes.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VOCAB = 300


def read_sections() -> dict[str, list[str]]:
    """Returns the code blocks of each section that has any."""
    found = {title: BLOCK.findall(text) for title, text in SECTION.findall(PAGE.read_text())}
    return {title: blocks for title, blocks in found.items() if blocks}


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page says is there before an example."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, VOCAB, (12,), generator=generator) for _ in range(4)]
    loader = [{"input_ids": torch.stack(sequences[at : at + 2])} for at in (0, 2)]
    torch.manual_seed(1)
    return {
        "torch": torch,
        "teacher": LocalTeacher(tiny.make_model("Gemma2", VOCAB)),
        "other_teacher": LocalTeacher(tiny.make_model("Llama", VOCAB)),
        "student": tiny.make_model("Llama", VOCAB).train(),
        "sequences": sequences,
        "token_ids": sequences[0],
        "loader": loader,
        "batch": loader[0],
    }


@pytest.mark.parametrize("title", read_sections())
def test_an_example_works_as_it_is_printed(names: dict[str, Any], title: str) -> None:
    space = dict(names)
    exec("from logitstream import distillation_loss", space)
    for block in read_sections()[title]:
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), space)
    loss = space.get("loss")
    if loss is not None:  # the last batch's, which can be trained on
        assert torch.isfinite(loss)
        loss.backward()
        assert any(parameter.grad is not None for parameter in space["student"].parameters())


def test_every_kind_has_a_line_in_the_table() -> None:
    from logit_codec.kinds import KINDS

    page = PAGE.read_text()
    for kind in KINDS:
        assert re.search(rf"^\| `{kind}[:`]", page, re.MULTILINE), kind
