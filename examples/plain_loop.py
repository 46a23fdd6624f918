"""A training loop that resumes where it stopped; arguments: HOST:PORT STUDENT CHECKPOINT TEXT..."""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from student_trainer import connect, data, distillation_loss

STEPS, SAVE_EVERY = 100, 20


def main(address: str, folder: str, checkpoint: str, *texts: str) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    sequences = data.pack([Path(text) for text in texts], tokenizer, 64, label="text")
    with connect(address, tokenizer=tokenizer) as teacher:
        pairs = teacher.stream_batches(data.batches(sequences, batch_size=8, steps=STEPS, seed=0))
        parts = {"student": student, "optimizer": optimizer, "position": pairs}
        if Path(checkpoint).exists():
            for name, state in torch.load(checkpoint, weights_only=True).items():
                parts[name].load_state_dict(state)
        for batch, targets in pairs:
            logits = student(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            loss = distillation_loss(logits, targets)  # one row per token that comes next
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step := pairs.state_dict()["handed_out"]) % SAVE_EVERY == 0:
                print(f"step {step}, loss {float(loss.detach()):.3f}", flush=True)
                torch.save({k: part.state_dict() for k, part in parts.items()}, f"{checkpoint}.new")
                Path(f"{checkpoint}.new").replace(checkpoint)  # half of one is never in its place


if __name__ == "__main__":
    if len(sys.argv) < 5:
        usage = "HOST:PORT STUDENT_FOLDER CHECKPOINT_FILE TEXT_FILE..."
        print(f"usage: python -m examples.plain_loop {usage}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
