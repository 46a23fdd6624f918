"""Makes what the recipes in docs/recipes run on: a tiny teacher, tiny students and a little data.

Run `python -m examples.recipes.stand_ins FOLDER` (a minute). In FOLDER there are then:

    corpus/      text: sources of Python's standard library
    chats.jsonl  conversations, in the column "messages"
    teacher/     a chat model, trained on both
    base/        a smaller model, trained on the text alone
    student/     the config and tokenizer of one as small, without weights
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from examples import demo_teacher
from logitstream.files import whole_folder
from student_trainer import data
from student_trainer.training.optimizers import make_muon

LENGTH = 96  # tokens
STEPS = 250
TURN_TOKENS = ["<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML; what the assistant writes is marked, as learning from it alone needs it."""


def make_stand_ins(folder: Path, *, steps: int = STEPS, num_files: int = 30) -> None:
    """Writes all of it into a new folder. Raises FileExistsError if there is one."""
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it to have it made again")
    files = demo_teacher.corpus_files()[0][:num_files]
    chats = make_chats(600)
    texts = [message["content"] for chat in chats for message in chat]
    tokenizer: Any = demo_teacher.make_tokenizer([*data.documents(files), *texts])
    tokenizer.add_special_tokens({"additional_special_tokens": TURN_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    text_rows = [{"input_ids": ids} for ids in data.pack(files, tokenizer, LENGTH, label="text")]
    chat_rows = [
        {"input_ids": tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]}
        for chat in chats
    ]
    with whole_folder(folder) as partial:
        (partial / "corpus").mkdir()
        for number, file in enumerate(files):
            shutil.copyfile(file, partial / "corpus" / f"{number:02}-{file.stem}.txt")
        lines = (json.dumps({"messages": chat}) for chat in chats)
        (partial / "chats.jsonl").write_text("\n".join(lines) + "\n")
        for name, size, rows in (
            ("teacher", 128, text_rows + 4 * chat_rows),
            ("base", 64, text_rows),
            ("student", 64, None),
        ):
            config = make_config(size, tokenizer)
            tokenizer.save_pretrained(partial / name)
            config.save_pretrained(partial / name)
            if rows is not None:
                train(config, rows, tokenizer, steps, partial / name)


def make_chats(count: int) -> list[list[dict[str, str]]]:
    """Makes conversations about sums, some of them with a system prompt, some of two turns."""
    chance = random.Random(0)
    chats = []
    for _ in range(count):
        name = chance.choice(["Ann", "Ben", "Cho", "Dia"])
        thing = chance.choice(["apples", "books", "coins", "pens"])
        has, gets = chance.randrange(2, 50), chance.randrange(2, 50)
        asked = f"{name} has {has} {thing} and gets {gets} more. How many {thing} are that?"
        told = f"{has} + {gets} = {has + gets}. {name} has {has + gets} {thing}."
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        if chance.random() < 0.5:
            chat.insert(0, {"role": "system", "content": "Show the sum."})
        if chance.random() < 0.3:
            chat.append({"role": "user", "content": f"Who has the {thing}?"})
            chat.append({"role": "assistant", "content": f"{name} has them."})
        chats.append(chat)
    return chats


def make_config(hidden_size: int, tokenizer: Any) -> transformers.LlamaConfig:
    """Makes the config of a 2-layer Llama."""
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_TOKENS[1]),
    )


def train(
    config: transformers.LlamaConfig,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    steps: int,
    folder: Path,
) -> None:
    """Trains a model of this config on rows of ids and saves it."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=16,
            max_steps=steps,
            warmup_steps=10,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizers=(make_muon(model, learning_rate=1.5e-2), None),
    )
    trainer.train()
    model.save_pretrained(folder)


def main() -> None:
    """Makes them in the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Make what the recipes run on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training of each model")
    options = parser.parse_args()
    make_stand_ins(options.folder, steps=options.steps)


if __name__ == "__main__":
    main()
