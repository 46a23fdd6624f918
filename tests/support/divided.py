"""What an engine finds, alone or divided among ranks: the same requests and texts for both."""

from pathlib import Path

import torch
from torch import Tensor

from logit_codec import GivenIds, parse_targets
from teacher_server.config import ServeConfig
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.engine import Engine
from teacher_server.ranks.group import start_ranks
from teacher_server.startup import load_engine
from tests.support.written import give_back, write

SPECS = (
    "top_k:16,bits=16,log_z=1,entropy=1",
    "sampled:64",
    "top_k:min_p=1/256,max_k=64",
    "realized",
    "dense",
    "given_ids:bits=32,ranks=1",
    "hidden:bf16",
    "features:layers=0+1",
)
LENGTHS = (2, 40, 130, 17, 200)
RULES = (DrawRule(temperature=0.0), DrawRule(seed=5), DrawRule(seed=6, top_k=20, top_p=0.9))

Found = dict[str, list[dict[str, Tensor]]]
"""What was found, by what was asked: the tensors of each sequence by name."""


def find(engine: Engine, vocab_size: int) -> Found:
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(2, vocab_size, (n,), generator=generator) for n in LENGTHS]
    found: Found = {}
    for text in SPECS:
        requests = []
        for ids in sequences:
            rows = torch.arange(len(ids) - 1)
            spec = parse_targets(text)
            given = None
            if spec.needs_given_ids:
                given = torch.rand(len(rows), vocab_size, generator=generator).topk(5, 1).indices
                spec, given = spec.for_rows(5), GivenIds.of(given).padded()
            uniforms = torch.rand(len(rows), generator=generator, dtype=torch.float64)
            requests.append(RowRequest(ids, rows, spec, 0.9, uniforms, given))
        rows_of = engine.result(engine.launch(requests))[0]
        found[text] = [dict(piece[0][piece[1]].columns) for one in rows_of for piece in one.pieces]
    writer = engine.open_generation(8 << 20)
    for rule in RULES:
        spec = parse_targets("top_k:8")
        texts = [Continuation(ids, rule, spec) for ids in sequences]
        targets = write(writer, texts, 20)
        found[str(rule)] = [
            {
                "new_ids": torch.tensor(text.new_ids),
                "ids": torch.cat([one.token_ids for one in of_text]),
                "logprobs": torch.cat([one.logprobs for one in of_text]),
            }
            for text, of_text in zip(texts, targets, strict=True)
        ]
        give_back(writer, texts)
    return found


def find_divided(folders: list[Path], vocab_sizes: list[int], out: Path) -> None:
    """Saves what two ranks find, for each of several teachers; run it in a process of its own."""
    for number, (folder, vocab_size) in enumerate(zip(folders, vocab_sizes, strict=True)):
        config = ServeConfig(model=str(folder), tensor_parallel_size=2, device="cpu", threads=1)
        config, group = start_ranks(config)
        assert group is not None
        engine = load_engine(config, group.rank, group)
        torch.save(find(engine, vocab_size), out / f"{number}.pt")
        group.close()
