"""Lets a student continue prompts, and keeps what its teacher is going to be asked about.

Letters: B texts, P tokens of the longest prompt, N new tokens of the longest text, W written tokens of
all texts, K ids of the student's support, V vocabulary.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from logit_codec import GivenIds
from student_trainer.on_policy.arguments import OnPolicyArguments
from student_trainer.teachers.layout import IGNORE_INDEX


@dataclass(frozen=True, slots=True, eq=False)
class WrittenTexts:
    """Holds the texts of one batch, each a prompt and what the student wrote; on the CPU.

    None of its tensors has a gradient, or came from a computation that had one.
    """

    token_ids: list[Tensor]
    """B of (L,) int64; the last token is the stop token, if the student wrote one."""
    prompt_lengths: list[int]
    likeliest: Tensor
    """(W, K) int32: the ids that the student held likeliest in place of each written token."""
    entropies: Tensor
    """(W,) float32: the entropy of the student's distribution there, at temperature 1."""
    num_stopped: int
    """Texts that ended with a stop token."""
    version: int
    """How many optimizer steps the weights had taken that wrote them."""
    seconds: float = 0.0
    """How long the student wrote."""

    @property
    def num_written(self) -> int:
        """W."""
        return len(self.entropies)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts, prompts included."""
        return sum(map(len, self.token_ids))

    def make_batch(
        self, pad_id: int, untrained: Tensor, columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns a batch, padded on the right, whose labels are the written tokens.

        untrained: (S,) ids whose rows are left out, although the student wrote them. columns: of the
        rows, beside the tokens.
        """
        labels = []
        for ids, start in zip(self.token_ids, self.prompt_lengths, strict=True):
            own = ids.masked_fill(torch.isin(ids, untrained), IGNORE_INDEX)
            own[:start] = IGNORE_INDEX
            labels.append(own)
        lengths = torch.tensor([len(ids) for ids in self.token_ids])
        ids = pad_sequence(self.token_ids, batch_first=True, padding_value=pad_id)
        return {
            **columns,
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }

    def give_ids(self, untrained: Tensor) -> GivenIds:
        """Returns the student's likeliest ids and the written one, for each row that is trained."""
        written_W = torch.cat(
            [ids[n:] for ids, n in zip(self.token_ids, self.prompt_lengths, strict=True)]
        )
        ids_WM = torch.cat([self.likeliest.long(), written_W[:, None]], 1)
        return GivenIds.of(ids_WM[~torch.isin(written_W, untrained)])

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns everything that a later `of_tensors` needs, for a file."""
        return {
            "token_ids": torch.cat(self.token_ids),
            "lengths": torch.tensor([len(ids) for ids in self.token_ids]),
            "prompt_lengths": torch.tensor(self.prompt_lengths),
            "likeliest": self.likeliest,
            "entropies": self.entropies,
            "numbers": torch.tensor([self.num_stopped, self.version]),
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "WrittenTexts":
        """Reads what `to_tensors` returned."""
        num_stopped, version = tensors["numbers"].tolist()
        return cls(
            list(tensors["token_ids"].split(tensors["lengths"].tolist())),
            tensors["prompt_lengths"].tolist(),
            tensors["likeliest"],
            tensors["entropies"],
            num_stopped,
            version,
        )

    def continues(self, prompts: Sequence[Tensor]) -> bool:
        """Whether these are continuations of the prompts."""
        return len(prompts) == len(self.token_ids) and all(
            length == len(prompt) and torch.equal(ids[:length], prompt)
            for ids, length, prompt in zip(
                self.token_ids, self.prompt_lengths, prompts, strict=True
            )
        )


class Writer:
    """Writes with a student, without changing anything of its training."""

    def __init__(
        self,
        student: Any,
        tokenizer: Any,
        arguments: OnPolicyArguments,
        *,
        num_ids: int,
        seed: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """tokenizer: None where none is known: then only the stop ids of the student are special.

        num_ids: those that the teacher knows; the student writes no other. autocast: makes the context
        in which the student computes. Raises ValueError for a student that cannot write.
        """
        if not callable(getattr(student, "generate", None)):
            raise ValueError(
                f"the student is a {type(student).__name__} without generate, and on-policy training "
                "lets it write: give a causal LM of transformers, or leave on-policy out"
            )
        self._student = student
        self._arguments = arguments
        self._num_ids = num_ids
        self._seed = seed
        self._autocast = autocast
        self.stop_ids = find_stop_ids(student, tokenizer)
        special = {*self.stop_ids, *(getattr(tokenizer, "all_special_ids", None) or ())}
        self.untrained = torch.tensor(
            [] if arguments.train_special_tokens else sorted(special), dtype=torch.int64
        )
        """(S,) ids whose rows are not trained where the student wrote them."""
        known = getattr(tokenizer, "pad_token_id", None), *self.stop_ids, 0
        self.pad_id = next(one for one in known if one is not None)

    def write(self, prompts: Sequence[Tensor], *, name: str, version: int) -> WrittenTexts:
        """Continues B prompts, each (P,) int64 on the CPU.

        name: of the batch; the same seed, name, prompts and weights write the same texts. version: how
        many optimizer steps the weights have taken.
        """
        began_s = time.perf_counter()
        seed = xxhash.xxh64_intdigest(f"writing {self._seed} {name}".encode()) >> 1
        device = next(self._student.parameters()).device
        recorder = _Recorder(self._arguments, self._num_ids)
        longest = max(map(len, prompts))
        ids_BP = torch.full((len(prompts), longest), self.pad_id)
        mask_BP = torch.zeros_like(ids_BP)
        for row, prompt in enumerate(prompts):
            ids_BP[row, longest - len(prompt) :] = prompt
            mask_BP[row, longest - len(prompt) :] = 1
        with (
            torch.no_grad(),
            _writing(self._student),
            _own_randomness(device, seed),
            self._autocast(),
        ):
            found = self._student.generate(
                input_ids=ids_BP.to(device),
                attention_mask=mask_BP.to(device),
                generation_config=self._make_config(),
                logits_processor=[recorder],
            )
        new_BN = found[:, longest:].cpu()
        lengths = self._find_lengths(new_BN)
        likeliest_BNK, entropies_BN = recorder.stack(new_BN.shape[1])
        written_BN = torch.arange(new_BN.shape[1]) < lengths[:, None]
        stops_B = torch.isin(
            new_BN.gather(1, lengths[:, None] - 1)[:, 0],
            torch.tensor(self.stop_ids, dtype=torch.int64),
        )
        return WrittenTexts(
            [
                torch.cat([prompt, new_N[:length]])
                for prompt, new_N, length in zip(prompts, new_BN, lengths.tolist(), strict=True)
            ],
            [len(prompt) for prompt in prompts],
            likeliest_BNK[written_BN],
            entropies_BN[written_BN],
            int(stops_B.sum()),
            version,
            time.perf_counter() - began_s,
        )

    def _find_lengths(self, new_BN: Tensor) -> Tensor:
        """Returns (B,) how many new tokens each text has, its stop token included."""
        stops_BN = torch.isin(new_BN, torch.tensor(self.stop_ids, dtype=torch.int64))
        before_BN = stops_BN.cumsum(1) - stops_BN.long()  # stop tokens before this one
        return (before_BN == 0).sum(1)

    def _make_config(self) -> Any:
        import transformers

        return transformers.GenerationConfig(
            max_new_tokens=self._arguments.max_new_tokens,
            do_sample=self._arguments.sampling_temperature > 0,
            temperature=1.0,  # the recorder sets it, after it has read the logits
            top_k=0,
            top_p=1.0,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.pad_id,
        )


class _Recorder:
    """Reads the student's logits of each new token, and then cuts them as the settings say.

    That is what transformers calls a logits processor; it needs no more of one than to be called.
    """

    def __init__(self, arguments: OnPolicyArguments, num_ids: int) -> None:
        from transformers.generation.logits_process import (
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._num_ids = num_ids
        self._support = arguments.support
        self._cuts: list[Any] = []
        if arguments.sampling_temperature not in (0, 1):
            self._cuts.append(TemperatureLogitsWarper(float(arguments.sampling_temperature)))
        if arguments.sampling_top_k:
            self._cuts.append(TopKLogitsWarper(arguments.sampling_top_k))
        if arguments.sampling_top_p < 1:
            self._cuts.append(TopPLogitsWarper(arguments.sampling_top_p))
        self._likeliest: list[Tensor] = []
        self._entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes and returns (B, V) logits of the next token."""
        if self._num_ids < scores.shape[1]:
            scores[:, self._num_ids :] = -torch.inf
        logprobs_BV = scores[:, : self._num_ids].log_softmax(1)
        support = min(self._support, logprobs_BV.shape[1])
        self._likeliest.append(logprobs_BV.topk(support, 1).indices.int())
        # Where p is 0, p * log p is too: written so that nothing is 0 * infinity.
        self._entropies.append(-(logprobs_BV.exp() * logprobs_BV.clamp(min=-1e4)).sum(1))
        for cut in self._cuts:
            scores = cut(input_ids, scores)
        return scores

    def stack(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns (B, N, K) ids and (B, N) entropies of the N tokens that were kept, on the CPU."""
        # Where `generate` notices a stop one pass late, its last token is thrown away.
        likeliest, entropies = self._likeliest[:num_tokens], self._entropies[:num_tokens]
        return torch.stack(likeliest, 1).cpu(), torch.stack(entropies, 1).cpu()


def find_stop_ids(student: Any, tokenizer: Any) -> list[int]:
    """Returns the ids that end a text: those of the student's generation settings and tokenizer."""
    settings = getattr(student, "generation_config", None)
    found = getattr(settings, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    lists: list[Collection[int]] = [
        () if one is None else (one,) if isinstance(one, int) else one for one in found
    ]
    return sorted({int(one) for each in lists for one in each})


@contextmanager
def _writing(student: nn.Module) -> Iterator[None]:
    """Turns dropout off, and the student's own settings of generation; puts both back."""
    import transformers

    modes = [(module, module.training) for module in student.modules()]
    get_base = getattr(student, "get_base_model", None)  # of adapters
    owners: list[Any] = [student, *([get_base()] if get_base is not None else [])]
    settings = [(owner, getattr(owner, "generation_config", None)) for owner in owners]
    try:
        student.eval()
        for owner in owners:
            owner.generation_config = transformers.GenerationConfig()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for owner, setting in settings:
            owner.generation_config = setting


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seeds the draws of the device, and afterwards goes on where the training was."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
