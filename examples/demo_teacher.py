"""Makes the demo's small teacher: a Gemma 2 model trained on the standard library's sources.

Run `python -m examples.demo_teacher FOLDER`; FOLDER becomes an ordinary Hugging Face folder.
"""

import argparse
import hashlib
import json
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from logitstream.files import whole_folder
from student_trainer import data
from student_trainer.training.optimizers import make_muon

VOCABULARY = 1024
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]  # ids 0, 1, 2
SEQUENCE = 128  # tokens
BATCH = 16  # sequences
STEPS = 400
WARMUP = 10  # steps
LEARNING_RATE = 1.5e-2
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


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; every byte has a token, so no text is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, learner)
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


def make_config(hidden_size: int) -> Gemma2Config:
    """A 2-layer Gemma 2: half a million parameters with hidden size 128, a third of it with 64."""
    return Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        query_pre_attn_scalar=hidden_size // 4,
        sliding_window=SEQUENCE // 2,  # shorter than a sequence, so that the window matters
        max_position_embeddings=2 * SEQUENCE,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
    )


def build_teacher(folder: Path, *, steps: int = STEPS, seed: int = 0) -> dict:
    """Train the teacher into `folder`, or reuse one made there with the same steps and seed.

    Beside it, `folder`-student gets the config and tokenizer of a student, without weights.
    Returns the settings, the counts of parameters and training tokens, the whole build's seconds
    and the held-out loss in nats a token. `folder` appears only when complete: an interrupted
    build leaves nothing to reuse. Raises FileExistsError if `folder` holds anything else.
    """
    if folder.exists():
        record = folder / RECORD
        facts = json.loads(record.read_text()) if record.exists() else {}
        if (facts.get("steps"), facts.get("seed")) != (steps, seed):
            raise FileExistsError(
                f"{folder} is not the demo's teacher of {steps} steps and seed {seed}; remove it "
                "to have it made again"
            )
        return facts

    started = time.monotonic()
    train_files, held_out_files = corpus_files()
    tokenizer = make_tokenizer(data.documents(train_files))
    sequences = data.pack(train_files, tokenizer, SEQUENCE, label="data")
    held_out = data.pack(held_out_files, tokenizer, SEQUENCE, label="held-out data")
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(make_config(hidden_size=128))
    with whole_folder(folder) as partial:
        trainer = Trainer(
            model,
            TrainingArguments(
                str(partial),
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=2 * BATCH,
                max_steps=steps,
                warmup_steps=WARMUP,
                seed=seed,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                use_cpu=True,  # the same teacher on every machine
                dataloader_pin_memory=False,
            ),
            train_dataset=_as_rows(sequences),
            eval_dataset=_as_rows(held_out[:256]),
            optimizers=(make_muon(model, learning_rate=LEARNING_RATE), None),
        )
        trainer.train()
        facts = {
            "steps": steps,
            "seed": seed,
            "parameters": model.num_parameters(),
            "tokens": steps * BATCH * SEQUENCE,
            "held_out_loss": round(trainer.evaluate()["eval_loss"], 4),
            "seconds": round(time.monotonic() - started, 1),
        }
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(facts, indent=2) + "\n")
        student = student_folder(folder)
        make_config(hidden_size=64).save_pretrained(student)
        tokenizer.save_pretrained(student)
    return facts


def _as_rows(sequences: torch.Tensor) -> Any:
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def student_folder(folder: Path) -> Path:
    """Where the student that belongs to a teacher's folder is."""
    return folder.with_name(f"{folder.name}-student")


def make_student(folder: Path, seed: int) -> Gemma2ForCausalLM:
    """Makes that student with random weights."""
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(Gemma2Config.from_pretrained(student_folder(folder)))


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
