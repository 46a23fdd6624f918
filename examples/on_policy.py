"""Distils a student on its own text: in transformers' Trainer first, then in a loop of one's own.

Run `python -m examples.on_policy HOST:PORT STUDENT_FOLDER OUTPUT_FOLDER TEXT_FILE...`. The Trainer mixes
both kinds of batches, half of them from the text and half written by the student after its beginnings.
The loop that follows has nothing but prompts.
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from student_trainer import (
    OnPolicyArguments,
    OnPolicyBatches,
    connect,
    data,
    distillation_loss,
)
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer

STEPS, SAVE_EVERY = 100, 20
WRITING = OnPolicyArguments(fraction=0.5, targets="hidden:int8", prompt_tokens=8, max_new_tokens=32)


def train_in_trainer(address: str, folder: str, output: str, *texts: str) -> DistillationTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    transformers.set_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    sequences = data.pack([Path(text) for text in texts], tokenizer, 64, label="text")
    trainer = DistillationTrainer(
        model=student,
        args=transformers.TrainingArguments(
            output,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=SAVE_EVERY,
            save_steps=SAVE_EVERY,
            report_to="none",
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in sequences],
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        teacher=address,
        distillation=DistillationArguments(targets="sampled"),  # of the batches from the text
        on_policy=WRITING,
    )
    trainer.train(resume_from_checkpoint=any(Path(output).glob("checkpoint-*")))
    trainer.close()
    return trainer


def train_in_loop(address: str, student, tokenizer, prompts: list[str], steps: int) -> list[float]:
    losses = []
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    with connect(address, tokenizer=tokenizer) as teacher:
        batches = OnPolicyBatches(
            student, prompts, teacher, tokenizer, arguments=WRITING, batch_size=4
        )
        for _, (batch, targets) in zip(range(steps), batches, strict=False):
            trained = batch["labels"][:, 1:].flatten() != -100
            output = student(batch["input_ids"], attention_mask=batch["attention_mask"])
            logits = output.logits[:, :-1].flatten(0, 1)[trained]
            loss = distillation_loss(logits, targets, divergence="reverse_kl")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            batches.step()  # what is written from now on comes from these weights
            losses.append(loss.item())
        print(batches.take_logs())
        batches.close()
    return losses


def main(address: str, folder: str, output: str, *texts: str) -> list[float]:
    trainer = train_in_trainer(address, folder, output, *texts)
    prompts = [line for text in texts for line in Path(text).read_text().splitlines() if line]
    tokenizer = trainer.processing_class
    return train_in_loop(address, trainer.model, tokenizer, [p[:40] for p in prompts] * 100, STEPS)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        usage = "HOST:PORT STUDENT_FOLDER OUTPUT_FOLDER TEXT_FILE..."
        print(f"usage: python -m examples.on_policy {usage}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
