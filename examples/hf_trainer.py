"""Distils a student with transformers' Trainer, and resumes from its last checkpoint.

Run `python -m examples.hf_trainer HOST:PORT STUDENT_FOLDER OUTPUT_FOLDER TEXT_FILE...`. What differs
from a script that trains on labels: the name of the Trainer, and `teacher=`.
"""

import sys
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from student_trainer import data
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer

STEPS, SAVE_EVERY = 100, 20


def main(address: str, folder: str, output: str, *texts: str) -> DistillationTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    transformers.set_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    sequences = data.pack([Path(text) for text in texts], tokenizer, 64, label="text")
    rows = [{"input_ids": ids, "labels": ids} for ids in sequences]
    trainer = DistillationTrainer(
        model=student,
        args=transformers.TrainingArguments(
            output,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=SAVE_EVERY,
            save_steps=SAVE_EVERY,
            save_total_limit=2,
            report_to="none",  # or "tensorboard", "wandb": what is logged goes there too
        ),
        train_dataset=rows[20:],
        eval_dataset=rows[:20],
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        teacher=address,
        distillation=DistillationArguments(targets="sampled", ce_weight=0.1),
    )
    trainer.train(resume_from_checkpoint=any(Path(output).glob("checkpoint-*")))
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f}")
    trainer.close()
    return trainer


if __name__ == "__main__":
    if len(sys.argv) < 5:
        usage = "HOST:PORT STUDENT_FOLDER OUTPUT_FOLDER TEXT_FILE..."
        print(f"usage: python -m examples.hf_trainer {usage}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
