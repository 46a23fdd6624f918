import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from logit_codec import DenseSpec, DenseTargets, TopKSpec, TopKTargets
from teacher_server.engine.attention import NAME as PACKED_ATTENTION
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import load, prepare
from teacher_server.engine.model import MIN_BUCKET, TeacherModel, bucket_length
from teacher_server.engine.packing import Packer
from teacher_server.errors import ModelError
from tests.support import tiny

ModelFolder = Callable[[str, int], Path]
VOCAB = 1000


@pytest.fixture(autouse=True)
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hashes of weights are kept: never the user's own cache."""
    monkeypatch.delenv("LOGITSTREAM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "logitstream" / "weights.json"


@pytest.fixture
def folder(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A tiny Gemma 2 of this test's own."""
    return shutil.copytree(model_folder("Gemma2", VOCAB), tmp_path / "gemma")


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_tokenizer(folder: Path, size: int, prefix: str = "t") -> None:
    backend = Tokenizer(WordLevel({f"{prefix}{i}": i for i in range(size)}, unk_token=f"{prefix}0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=f"{prefix}0", eos_token=f"{prefix}1"
    ).save_pretrained(folder)


def refusal(model: str | Path, **options: str) -> str:
    """The message of the ModelError that loading gives, which must be one line."""
    with pytest.raises(ModelError) as caught:
        load(str(model), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# Canonical lengths, for architectures that cannot pack.

lengths = st.integers(1, 40_000)
contexts = st.integers(2, 1 << 17)


@given(lengths, lengths, contexts)
def test_longer_sequences_never_have_shorter_buckets(a: int, b: int, context: int) -> None:
    short, long = sorted((a, b))
    assert bucket_length(short, context) <= bucket_length(long, context)


@given(lengths, contexts)
def test_a_bucket_is_at_least_32_unless_the_context_is_shorter(length: int, context: int) -> None:
    assert bucket_length(length, context) >= min(MIN_BUCKET, context)


@given(lengths, contexts)
def test_a_bucket_holds_its_sequence_and_never_exceeds_the_context(
    length: int, context: int
) -> None:
    bucket = bucket_length(length, context)
    assert bucket <= context
    assert bucket >= min(length, context)


@given(st.integers(256, 200_000))
def test_at_most_an_eighth_is_wasted_from_256_on(length: int) -> None:
    assert bucket_length(length, 1 << 20) <= length * 9 / 8


@given(lengths, contexts)
def test_a_bucket_is_its_own_bucket(length: int, context: int) -> None:
    bucket = bucket_length(length, context)
    assert bucket_length(bucket, context) == bucket


@given(lengths, contexts)
def test_buckets_are_multiples_of_32_below_the_context(length: int, context: int) -> None:
    bucket = bucket_length(length, context)
    assert bucket == context or bucket % MIN_BUCKET == 0


def test_there_are_few_buckets() -> None:
    # What is padded to a bucket can share a batch: at most 8 of them per power of two.
    found = {bucket_length(n, 8192) for n in range(1, 8193)}
    assert {n for n in found if n <= 256} == set(range(32, 257, 32))
    assert len(found) == 8 + 5 * 8


# What loads.


def run_pack(model: TeacherModel, *sequences: Tensor) -> Tensor:
    """Returns the hidden states of sequences in one pack, back to back, without its padding."""
    rows = torch.empty(0, dtype=torch.int64)
    requests = [RowRequest(ids, rows, TopKSpec(k=1)) for ids in sequences]
    (pack,) = Packer("cpu", pack_tokens=4096).pack(requests)
    hidden = model.hidden_states(pack.token_ids, pack.positions, pack.cu_seqlens, pack)
    return hidden[: pack.num_tokens]


def test_a_folder_of_save_pretrained_loads_with_its_dimensions(folder: Path) -> None:
    model = load(str(folder))
    assert (model.name, model.revision) == ("gemma", "")
    assert (model.vocab_size, model.effective_vocab_size) == (VOCAB, VOCAB)
    assert model.max_sequence_tokens == tiny.CONTEXT
    assert model.architecture == "Gemma2ForCausalLM"
    assert model.dtype == torch.float32
    assert model.tokenizer is None
    assert model.tokenizer_fingerprint == ""
    assert len(model.weights_fingerprint) == len(model.teacher_fingerprint) == 64


def test_attention_is_eager_with_a_softcap_and_sdpa_without_unless_told_otherwise(
    folder: Path, model_folder: ModelFolder
) -> None:
    llama = str(model_folder("Llama", VOCAB))
    assert load(str(folder)).own_attention == "eager"
    assert load(llama).own_attention == "sdpa"
    assert load(llama, attention="eager").own_attention == "eager"


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_architecture_runs_packs_unless_an_attention_is_asked_for(
    name: str, model_folder: ModelFolder
) -> None:
    path = str(model_folder(name, VOCAB))
    assert load(path).is_packed
    assert load(path).attention == PACKED_ATTENTION
    chosen = load(path, attention="eager")
    assert not chosen.is_packed
    assert chosen.attention == "eager"


def test_nothing_of_a_loaded_teacher_is_trained_or_random(folder: Path) -> None:
    model = load(str(folder))
    assert not model.causal_lm.training
    assert not any(parameter.requires_grad for parameter in model.causal_lm.parameters())


def test_the_weights_take_the_dtype_that_is_asked_for(folder: Path) -> None:
    model = load(str(folder), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    (ids,) = tiny.random_sequences(1, VOCAB)
    assert model.logits(run_pack(model, ids)).dtype == torch.bfloat16
    assert model.logits(model.padded_hidden_states([ids])[0]).dtype == torch.bfloat16


@pytest.mark.parametrize(("asked", "longest"), [(None, 256), (100, 100), (1000, 256)])
def test_sequences_are_limited_by_the_context_and_by_the_operator(
    folder: Path, asked: int | None, longest: int
) -> None:
    assert load(str(folder), max_sequence_tokens=asked).max_sequence_tokens == longest


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_only_mixtral_has_experts(name: str, model_folder: ModelFolder) -> None:
    assert load(str(model_folder(name, VOCAB))).has_experts == (name == "Mixtral")


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_head_of_the_hidden_states_is_the_whole_forward(
    name: str, model_folder: ModelFolder
) -> None:
    model = load(str(model_folder(name, VOCAB)))
    (ids,) = tiny.random_sequences(1, VOCAB, seed=2)
    theirs = tiny.dense_logits(model.causal_lm, ids)
    for hidden in (run_pack(model, ids), model.padded_hidden_states([ids])[0]):
        ours = model.logits(hidden)[: len(ids) - 1]
        assert (ours - theirs).abs().max() < 1e-4


def test_hidden_states_are_padded_to_the_canonical_length(folder: Path) -> None:
    model = load(str(folder))
    sequences = [torch.arange(n) for n in (33, 50, 64)]
    assert model.padded_hidden_states(sequences).shape == (3, 64, 64)


# What is refused.


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    message = refusal(path)
    assert f"there is no folder {path}" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("name", ["./nowhere", "../a/b", "~/models/gemma", "a/b/c"])
def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(name: str) -> None:
    assert f"there is no folder {name}" in refusal(name)


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    message = refusal(folder)
    assert str(folder) in message
    assert "config.json" in message


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"model_type": "no-such-model"}'])
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder) in refusal(folder)


def test_a_config_with_a_value_of_the_wrong_type_is_refused(folder: Path) -> None:
    change_config(folder, num_attention_heads="four")
    message = refusal(folder)
    assert str(folder) in message
    assert "num_attention_heads" in message


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)


def test_a_model_without_its_head_is_refused_naming_what_is_missing(tmp_path: Path) -> None:
    tiny.make_model("Llama", VOCAB).base_model.save_pretrained(tmp_path / "base")
    message = refusal(tmp_path / "base")
    assert "lm_head.weight" in message
    assert "LlamaForCausalLM" in message


def test_a_truncated_state_is_refused_naming_what_is_missing(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    message = refusal(folder)
    assert "lacks 1 weights" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_weight_of_another_shape_is_refused_naming_it(folder: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(64, 64)}))
    assert name in refusal(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 20_000])
def test_a_file_that_was_cut_off_is_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(folder) in refusal(folder)


def test_a_file_that_is_not_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>404 not found</html>")
    assert str(folder) in refusal(folder)


def test_an_unknown_dtype_is_refused_with_those_that_are_known(folder: Path) -> None:
    assert refusal(folder, dtype="int8") == (
        "dtype must be auto, float32, bfloat16, float16; got 'int8'"
    )


def test_an_unknown_device_is_refused(folder: Path) -> None:
    assert "banana" in refusal(folder, device="banana")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    assert "CUDA" in refusal(folder, device="cuda")


def test_an_unknown_attention_is_refused(folder: Path) -> None:
    assert "banana" in refusal(folder, attention="banana")


def bert_config() -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=tiny.CONTEXT,
    )


def test_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    transformers.BertModel(bert_config()).save_pretrained(tmp_path / "bert")
    assert "lacks" in refusal(tmp_path / "bert")


def test_a_masked_language_model_is_refused_though_it_has_a_head(tmp_path: Path) -> None:
    # It sees what comes next, and it sees the padding: its rows are no next-token distributions.
    transformers.BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "bert")
    assert "Bert" in refusal(tmp_path / "bert")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert "T5Config" in refusal(tmp_path / "t5")


class Untypical(transformers.LlamaForCausalLM):
    """Its logits depend on the ids beside the hidden states."""

    def forward(self, input_ids: Tensor | None = None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            output.logits = output.logits + input_ids[..., None] % 2
        return output


def test_a_model_whose_logits_are_not_made_from_its_hidden_states_is_refused() -> None:
    config = tiny.make_model("Llama", VOCAB).config
    with pytest.raises(ModelError, match="Untypical differ from its head"):
        prepare(Untypical(config))


def test_a_base_model_in_memory_is_refused() -> None:
    with pytest.raises(ModelError, match="has no vocabulary head"):
        prepare(tiny.make_model("Llama", VOCAB).base_model)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{nope", "{}", "[]", "null"),
        '{"version": "1.0", "added_tokens": []}',
        '{"version": "1.0", "added_tokens": [], "model": {"type": "NoSuch"}}',
    ],
)
def test_a_broken_tokenizer_is_refused(folder: Path, text: str) -> None:
    save_tokenizer(folder, VOCAB)
    (folder / "tokenizer.json").write_text(text)
    message = refusal(folder)
    assert "tokenizer" in message
    assert str(folder) in message


# Padding rows of the head.


def test_a_tokenizer_as_large_as_the_head_leaves_no_padding(folder: Path) -> None:
    save_tokenizer(folder, VOCAB)
    model = load(str(folder))
    assert (model.vocab_size, model.effective_vocab_size) == (VOCAB, VOCAB)


def test_a_tokenizer_larger_than_the_head_adds_no_ids(folder: Path) -> None:
    save_tokenizer(folder, VOCAB + 10)
    assert load(str(folder)).effective_vocab_size == VOCAB


def test_a_smaller_tokenizer_gives_the_effective_vocabulary(folder: Path) -> None:
    save_tokenizer(folder, 900)
    model = load(str(folder))
    assert (model.vocab_size, model.effective_vocab_size) == (VOCAB, 900)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_ids_have_probability_zero(folder: Path, temperature: float) -> None:
    save_tokenizer(folder, 900)
    model = load(str(folder))
    (ids,) = tiny.random_sequences(1, 900, seed=3)
    rows = torch.arange(len(ids) - 1)
    # Without the cut, padding ids would be among the most likely ones.
    logits = tiny.dense_logits(model.causal_lm, ids)
    assert (logits.argmax(1) >= 900).any()
    oracle = torch.log_softmax(logits[:, :900] / temperature, 1)

    batch = [
        RowRequest(ids, rows, spec, temperature) for spec in (DenseSpec(bits=32), TopKSpec(k=900))
    ]
    dense, top_k = Engine(model).score(batch)
    assert isinstance(dense, DenseTargets)
    assert isinstance(top_k, TopKTargets)
    assert dense.vocab_size == top_k.vocab_size == VOCAB
    assert (dense.logprobs[:, 900:] == -torch.inf).all()
    assert (dense.logprobs[:, :900] - oracle).abs().max() < 1e-5
    assert (top_k.token_ids.view(-1, 900) == torch.arange(900)).all()
    assert top_k.tail_logprob.exp().max() < 1e-6


# Fingerprints.


def test_a_copy_of_a_folder_is_the_same_teacher(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder, VOCAB)
    ours, copy = load(str(folder)), load(str(shutil.copytree(folder, tmp_path / "copy")))
    assert ours.weights_fingerprint == copy.weights_fingerprint
    assert ours.tokenizer_fingerprint == copy.tokenizer_fingerprint
    assert ours.teacher_fingerprint == copy.teacher_fingerprint


def change_one_number(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"][5] += 1e-3


def test_one_changed_weight_makes_another_teacher(folder: Path) -> None:
    before = load(str(folder))
    change_weights(folder, change_one_number)
    after = load(str(folder))
    assert before.weights_fingerprint != after.weights_fingerprint
    assert before.teacher_fingerprint != after.teacher_fingerprint


def test_another_dtype_makes_another_teacher_of_the_same_weights(folder: Path) -> None:
    full, half = load(str(folder)), load(str(folder), dtype="bfloat16")
    assert full.weights_fingerprint == half.weights_fingerprint
    assert full.teacher_fingerprint != half.teacher_fingerprint


def test_another_attention_makes_another_teacher(model_folder: ModelFolder) -> None:
    llama = str(model_folder("Llama", VOCAB))
    eager, sdpa = load(llama, attention="eager"), load(llama)
    assert eager.teacher_fingerprint != sdpa.teacher_fingerprint


@pytest.mark.parametrize(
    "change", [{"final_logit_softcapping": 5.0}, {"sliding_window": 8}, {"rms_norm_eps": 0.1}]
)
def test_another_config_makes_another_teacher(folder: Path, change: dict[str, float]) -> None:
    before = load(str(folder))
    change_config(folder, **change)
    after = load(str(folder))
    ids = torch.arange(40)
    both = [tiny.dense_logits(model.causal_lm, ids) for model in (before, after)]
    assert not torch.equal(*both)
    assert before.teacher_fingerprint != after.teacher_fingerprint


def test_another_tokenizer_makes_another_teacher(folder: Path) -> None:
    without = load(str(folder))
    save_tokenizer(folder, VOCAB)
    first = load(str(folder))
    save_tokenizer(folder, VOCAB, prefix="u")
    second = load(str(folder))
    fingerprints = {model.teacher_fingerprint for model in (without, first, second)}
    assert len(fingerprints) == 3
    assert without.weights_fingerprint == second.weights_fingerprint


def test_a_limit_makes_another_teacher_only_where_it_cuts_canonical_lengths(folder: Path) -> None:
    def fingerprint(limit: int | None, attention: str | None) -> str:
        model = load(str(folder), max_sequence_tokens=limit, attention=attention)
        return Engine(model).model.teacher_fingerprint

    # A sequence that is padded to the limit and not to its bucket may round differently.
    assert fingerprint(None, "eager") != fingerprint(100, "eager")
    # In a pack nothing depends on the longest sequence that is allowed.
    assert fingerprint(None, None) == fingerprint(100, None)


def test_whether_packs_are_run_makes_another_teacher(folder: Path) -> None:
    packed, own = load(str(folder)), load(str(folder), attention="eager")
    assert packed.weights_fingerprint == own.weights_fingerprint
    assert packed.teacher_fingerprint != own.teacher_fingerprint


def test_the_sizes_that_bytes_depend_on_are_part_of_the_fingerprint(folder: Path) -> None:
    model = load(str(folder))
    fingerprint = Engine(model).model.teacher_fingerprint
    assert fingerprint == Engine(model).model.teacher_fingerprint
    # Where chunks begin and end may change a bit; another number of tokens in a pack may not.
    assert fingerprint != Engine(model, chunk_nbytes=64 * 4 * VOCAB).model.teacher_fingerprint
    assert fingerprint != Engine(model, exact=False).model.teacher_fingerprint
    assert fingerprint == Engine(model, pack_tokens=1024).model.teacher_fingerprint


def test_a_model_in_memory_is_known_by_its_content() -> None:
    def fingerprint(change: bool = False, seed: int = 0) -> str:
        causal_lm = tiny.make_model("GPT2", VOCAB, seed)
        if change:
            causal_lm.transformer.ln_f.bias.data[0] += 1e-3
        return prepare(causal_lm).weights_fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(change=True), fingerprint(seed=1)}) == 3


# The kept hashes of weights.


def fingerprint_with_forged_cache(folder: Path, cache_file: Path) -> tuple[str, str]:
    honest = load(str(folder)).weights_fingerprint
    forged = {key: "0" * 64 for key in json.loads(cache_file.read_text())}
    cache_file.write_text(json.dumps(forged))
    return honest, load(str(folder)).weights_fingerprint


def test_the_kept_hash_spares_reading_the_weights_again(folder: Path, cache_file: Path) -> None:
    honest, forged = fingerprint_with_forged_cache(folder, cache_file)
    assert honest != forged  # so the weights were not hashed again


def test_a_kept_hash_does_not_outlive_the_file(folder: Path, cache_file: Path) -> None:
    honest, _ = fingerprint_with_forged_cache(folder, cache_file)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)  # the same content at another time
    assert load(str(folder)).weights_fingerprint == honest


def test_the_hashes_of_other_teachers_are_kept(
    folder: Path, tmp_path: Path, cache_file: Path
) -> None:
    load(str(folder))
    load(str(shutil.copytree(folder, tmp_path / "other")))
    assert len(json.loads(cache_file.read_text())) == 2


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"null", b"1", b'"text"', b"[1]", b"[]", b"{}"]
)
def test_a_corrupt_cache_is_replaced(folder: Path, cache_file: Path, content: bytes) -> None:
    fingerprint = load(str(folder)).weights_fingerprint
    good = cache_file.read_bytes()
    cache_file.write_bytes(content)
    assert load(str(folder)).weights_fingerprint == fingerprint
    assert cache_file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = load(str(folder)).weights_fingerprint
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(str(folder)).weights_fingerprint == fingerprint


def test_the_cache_is_where_the_environment_says(
    folder: Path, cache_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path / "own"))
    load(str(folder))
    assert (tmp_path / "own" / "weights.json").exists()
    assert not cache_file.exists()


def test_weights_in_many_files_are_all_part_of_the_fingerprint(tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    tiny.make_model("Llama", VOCAB).save_pretrained(sharded, max_shard_size="200KB")
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 1
    before = load(str(sharded))
    weights = load_file(files[-1])
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1.0
    save_file(weights, files[-1], metadata={"format": "pt"})
    assert load(str(sharded)).weights_fingerprint != before.weights_fingerprint


@pytest.mark.parametrize(
    "value", ['"no hash"', '"\\ud800"', "5", "null", "9" * 5000, "[" * 100_000]
)
def test_a_damaged_cache_of_hashes_is_computed_again(
    folder: Path, cache_file: Path, value: str
) -> None:
    first = load(str(folder)).weights_fingerprint
    good = cache_file.read_text()
    ((identity, _),) = json.loads(good).items()
    cache_file.write_text(f"{{{json.dumps(identity)}: {value}}}")
    assert load(str(folder)).weights_fingerprint == first
    assert json.loads(cache_file.read_text()) == json.loads(good)


def test_a_config_that_is_nested_too_deep_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    assert f"cannot load a causal LM from {folder}" in refusal(folder)
