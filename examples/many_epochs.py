"""Records a little text's targets once, then trains many epochs from the record and from labels.

Run `python -m examples.many_epochs HOST:PORT STUDENT_FOLDER RECORD_FOLDER TEXT_FILE...`. The first
part asks the teacher for what RECORD_FOLDER has not yet; the second needs no teacher.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from student_trainer import Recorded, connect, data, distillation_loss

SEQUENCES, HELD_OUT, EPOCHS, DRAWS = 240, 128, 16, 4
BATCH, LEARNING_RATE = 8, 3e-3


def main(address: str, folder: str, record: str, *texts: str) -> dict[str, list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    everything = data.pack([Path(text) for text in texts], tokenizer, 64, label="text")
    sequences, held_out = everything[:SEQUENCES], everything[SEQUENCES:][:HELD_OUT]
    with (
        connect(address, tokenizer=tokenizer) as live,
        Recorded(record, live, tokenizer=tokenizer, draws=DRAWS) as recording,
    ):
        for draw in range(DRAWS):
            for _ in recording.stream(sequences, targets="sampled", epoch=draw):
                pass  # it is written down on the way
        print(f"{len(recording)} in the record, {recording.counters.asked} of them new")

    def train(teacher: Recorded | None) -> list[float]:
        torch.manual_seed(0)
        student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
        per_epoch = len(sequences) // BATCH
        batches = data.batches(sequences, batch_size=BATCH, steps=EPOCHS * per_epoch, seed=0)
        # Each batch says which epoch it is of, and so which draw it gets.
        labels_alone = ((batch, None) for batch in batches)
        pairs = labels_alone if teacher is None else teacher.stream_batches(batches)
        losses = []
        for step, (batch, targets) in enumerate(pairs, 1):
            logits = student(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["input_ids"][:, 1:].flatten()
            if targets is None:
                loss = torch.nn.functional.cross_entropy(logits, labels)
            else:
                loss = distillation_loss(logits, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % per_epoch == 0:
                student.eval()
                with torch.no_grad():
                    losses.append(float(student(input_ids=held_out, labels=held_out).loss))
                student.train()
        return losses

    with Recorded(record, tokenizer=tokenizer) as recorded:
        losses = {"labels": train(None), "distilled": train(recorded)}
    print("epoch  labels  distilled   held-out loss, nats per token")
    for epoch, pair in enumerate(zip(*losses.values(), strict=True), 1):
        print(f"{epoch:5}  {pair[0]:6.3f}  {pair[1]:9.3f}")
    return losses


if __name__ == "__main__":
    if len(sys.argv) < 5:
        usage = "HOST:PORT STUDENT_FOLDER RECORD_FOLDER TEXT_FILE..."
        print(f"usage: python -m examples.many_epochs {usage}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
