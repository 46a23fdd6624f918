"""Distils a teacher's layers beside its distribution; arguments: HOST:PORT STUDENT OUTPUT TEXT...

The student's layer 1 learns the teacher's layer 1, and its last layer the teacher's last one.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from student_trainer import FeatureLoss, connect, data, distillation_loss

STEPS, PRINT_EVERY = 100, 20


def main(address: str, folder: str, output: str, *texts: str) -> list[float]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    sequences = data.pack([Path(text) for text in texts], tokenizer, 64, label="text")
    with connect(address, tokenizer=tokenizer) as teacher:
        layers = {1: 1, teacher.info.num_layers: student.config.num_hidden_layers}
        feature_loss = FeatureLoss(layers, student.config.hidden_size, teacher.info.hidden_size)
        parameters = [*student.parameters(), *feature_loss.parameters()]  # the projectors learn too
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        # Two requests for the same batches: the teacher reads each of them twice. Without the
        # realized token's logprob, which the first one has, the second skips the vocabulary head.
        wanted = "sampled", f"features:layers={'+'.join(map(str, layers))},realized=0"
        streams = [
            teacher.stream_batches(
                data.batches(sequences, batch_size=8, steps=STEPS, seed=0), targets=targets
            )
            for targets in wanted
        ]
        losses = []
        for step, ((batch, targets), (_, features)) in enumerate(zip(*streams, strict=True), 1):
            outputs = student(input_ids=batch["input_ids"], output_hidden_states=True)
            logits = outputs.logits[:, :-1].flatten(0, 1)  # a row for each token that comes next
            states = [state[:, :-1].flatten(0, 1) for state in outputs.hidden_states]
            feature_part = feature_loss(states, features)
            loss = distillation_loss(logits, targets) + feature_part
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(feature_part.detach()))
            if step % PRINT_EVERY == 0:
                print(f"step {step}, loss {float(loss.detach()):.3f}, features {losses[-1]:.3f}")
    student.save_pretrained(output)  # without the projectors, which only the loss needed
    return losses


if __name__ == "__main__":
    if len(sys.argv) < 5:
        usage = "HOST:PORT STUDENT_FOLDER OUTPUT_FOLDER TEXT_FILE..."
        print(f"usage: python -m examples.features {usage}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
