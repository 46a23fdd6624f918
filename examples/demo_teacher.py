"""Makes the demo's small teacher: a Gemma 2 model trained on the standard library's sources.

Run `python -m examples.demo_teacher FOLDER`; FOLDER becomes an ordinary Hugging Face folder.
"""

import argparse
import hashlib
import json
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
SEQUENCE = 128  # tokens
BATCH = 16  # sequences
STEPS = 400
WARMUP = 10  # steps
LEARNING_RATE = 1.5e-2
MOMENTUM = 0.85  # of Muon; its usual 0.95 remembers too long for so short a run
RECORD = "demo_teacher.json"

# With the top-level modules these make about 200 files and 2 M tokens on every Python version.
PACKAGES = {"collections", "concurrent", "html", "http", "json", "logging", "re", "urllib"}


def corpus_files() -> tuple[list[Path], list[Path]]:
    """The demo's text: (files to train on, held-out files), each sorted by relative name.

    About one file in twenty is held out, by a hash of its name, so that the split is the same on
    every machine and stays the same when a Python version adds or drops a module.
    """
    library = Path(sysconfig.get_path("stdlib"))
    train, held_out = [], []
    candidates = [*library.glob("*.py")]
    for package in PACKAGES:
        candidates += (library / package).rglob("*.py")
    for path in sorted(candidates):
        if path.name.startswith("_sysconfigdata"):  # generated: one machine's build settings
            continue
        digest = hashlib.sha256(path.relative_to(library).as_posix().encode()).digest()
        (held_out if digest[0] % 20 == 0 else train).append(path)
    return train, held_out


def read_text(path: Path) -> str:
    """A source file's text; a byte that is no UTF-8 becomes the replacement character."""
    return path.read_text(encoding="utf-8", errors="replace")


def make_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `files`; every byte has a token, so no text is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],  # ids 0, 1, 2
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(map(read_text, files), trainer)
    # As Gemma's own tokenizer does: <bos> goes in front, <eos> is left to the caller.
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def token_sequences(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> torch.Tensor:
    """The files as one stream of `<bos> text <eos>`, cut into rows: [sequences, SEQUENCE] ids."""
    stream = []
    for ids in tokenizer([read_text(path) for path in files])["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    rows = len(stream) // SEQUENCE
    return torch.tensor(stream[: rows * SEQUENCE]).view(rows, SEQUENCE)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Gemma2ForCausalLM:
    """A Gemma 2 of about half a million parameters, with fresh weights from torch's seed."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=SEQUENCE // 2,  # shorter than a sequence, so that the window matters
        max_position_embeddings=2 * SEQUENCE,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
        attn_implementation="eager",  # the attention that applies the soft cap
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Gemma2ForCausalLM(config)


def make_optimisers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the (tied) embedding and the norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else rest).append(parameter)
    return [
        # match_rms_adamw scales Muon's updates so that one learning rate serves both.
        torch.optim.Muon(
            matrices,
            lr=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: Gemma2ForCausalLM, sequences: torch.Tensor, steps: int, seed: int) -> None:
    """Train in place on next-token cross-entropy; `sequences` is [sequences, SEQUENCE] ids."""
    optimisers = make_optimisers(model)

    def factor(step: int) -> float:
        return min((step + 1) / WARMUP, (steps - step) / max(steps - WARMUP, 1), 1.0)

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, factor) for each in optimisers]
    order = torch.Generator().manual_seed(seed)
    model.train()
    progress = tqdm(range(steps), desc="teacher", unit="step")
    shuffled = torch.empty(0, dtype=torch.long)
    for step in progress:
        if len(shuffled) < BATCH:  # first step, or every sequence was seen: a new epoch
            shuffled = torch.randperm(len(sequences), generator=order)
        batch, shuffled = sequences[shuffled[:BATCH]], shuffled[BATCH:]
        loss = model(input_ids=batch, labels=batch).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimisers, *schedules):
            each.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def mean_loss(model: Gemma2ForCausalLM, sequences: torch.Tensor) -> float:
    """Mean next-token loss over `sequences`, in nats a token."""
    model.eval()
    batches = sequences.split(64)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in batches]
    return sum(losses) / len(sequences)


def build_teacher(folder: Path, *, steps: int = STEPS, seed: int = 0) -> dict:
    """Train the teacher into `folder`, or reuse one made there with the same steps and seed.

    Returns the settings, the counts of parameters and training tokens, the whole build's seconds
    and the held-out loss in nats a token. `folder` appears only when complete: an interrupted
    build leaves nothing to reuse. Raises FileExistsError if `folder` holds anything else.
    """
    if folder.exists():
        record = folder / RECORD
        facts = json.loads(record.read_text()) if record.exists() else {}
        if (facts.get("steps"), facts.get("seed")) != (steps, seed):
            raise FileExistsError(f"{folder} is no demo teacher of {steps} steps and seed {seed}")
        return facts

    started = time.monotonic()
    train_files, held_out_files = corpus_files()
    tokenizer = make_tokenizer(train_files)
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    train(model, token_sequences(tokenizer, train_files), steps, seed)
    held_out_loss = mean_loss(model, token_sequences(tokenizer, held_out_files))
    facts = {
        "steps": steps,
        "seed": seed,
        "parameters": model.num_parameters(),
        "tokens": steps * BATCH * SEQUENCE,
        "seconds": round(time.monotonic() - started, 1),
        "held_out_loss": round(held_out_loss, 4),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        finished = Path(scratch, "finished")
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        (finished / RECORD).write_text(json.dumps(facts, indent=2) + "\n")
        finished.rename(folder)  # same file system, so the folder appears whole or not at all
    return facts


def main() -> None:
    """Build or reuse the teacher in the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Make the demo's teacher.")
    parser.add_argument("folder", type=Path, help="where the Hugging Face folder goes")
    folder = parser.parse_args().folder
    found = folder.exists()
    facts = build_teacher(folder)
    print(
        f"{'reused' if found else 'built'} {folder}: {facts['parameters']:,} parameters, "
        f"{facts['tokens']:,} training tokens, {facts['seconds']} s, "
        f"held-out loss {facts['held_out_loss']} nats"
    )


if __name__ == "__main__":
    main()
