"""Trains a student on texts that a teacher writes, with the teacher's distribution of every token.

Run `python -m examples.generate HOST:PORT STUDENT_FOLDER OUTPUT_FOLDER TEXT_FILE...`. The prompts are
the beginnings of sequences of the text; the teacher writes the next texts while the student learns.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from student_trainer import connect, data, distillation_loss

STEPS, BATCH, PROMPT, NEW = 100, 8, 16, 48
LEARNING_RATE, PRINT_EVERY = 3e-3, 10


def main(address: str, folder: str, output: str, *texts: str) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    sequences = data.pack([Path(text) for text in texts], tokenizer, 64, label="text")
    prompts = [sequence[:PROMPT] for sequence in sequences[: STEPS * BATCH]]
    losses = []
    with connect(address, tokenizer=tokenizer) as teacher:
        written = teacher.generate(prompts, max_new_tokens=NEW, targets="top_k:16", ahead=4 * BATCH)
        for step, batch in enumerate(zip(*[written] * BATCH, strict=False), 1):
            loss = torch.zeros(())
            for text in batch:
                ids = torch.cat([text.prompt_ids, text.token_ids])
                logits = student(input_ids=ids[None]).logits[0]
                # Row i of the targets is the distribution of the i-th new token.
                new = logits[len(text.prompt_ids) - 1 : -1]
                loss = loss + distillation_loss(new, text.targets) / BATCH
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if step % PRINT_EVERY == 0:
                print(f"step {step} loss {losses[-1]:.3f}")
                print(f"  the teacher wrote: {tokenizer.decode(batch[0].token_ids)[:70]}...")
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return losses


if __name__ == "__main__":
    if len(sys.argv) < 5:
        usage = "HOST:PORT STUDENT_FOLDER OUTPUT_FOLDER TEXT_FILE..."
        print(f"usage: python -m examples.generate {usage}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
