"""What --measure measures: the production engine, with all layers or two smaller numbers of them."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from teacher_server.commands.plan import make
from teacher_server.errors import ModelError
from teacher_server.plan_config import PlanConfig
from teacher_server.planning.flops import count_flops
from teacher_server.planning.gpus import GIB, GPUS
from teacher_server.planning.measure import (
    Depths,
    choose_depths,
    find_period,
    measure_engine,
    with_layers,
)
from teacher_server.planning.memory import MemoryOptions
from teacher_server.planning.sizes import describe_layers, measure_sizes
from tests.support.tiny import make_model


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("aaaa", (0, 1)),
        ("abab", (0, 2)),
        ("aaabaaab", (0, 4)),
        ("daaaa", (1, 1)),
        ("ddabab", (2, 2)),
        ("ab", (0, 2)),
        ("a", (0, 1)),
    ],
)
def test_layers_repeat_after_what_begins_them(layers: str, expected: tuple[int, int]):
    assert find_period(layers) == expected


def tiny_config(name: str, layers: int) -> transformers.PreTrainedConfig:
    return make_model(name, 300, num_hidden_layers=layers).config


def options(device_nbytes: float) -> MemoryOptions:
    return MemoryOptions("float32", "none", 1024, 1 << 20, 0, device_nbytes)


@pytest.mark.parametrize("name", ["Gemma2", "Llama", "Mixtral"])
def test_a_config_of_fewer_layers_describes_the_first_ones(name: str):
    config = tiny_config(name, 4)
    fewer = with_layers(config, 2)
    assert describe_layers(fewer.get_text_config()) == describe_layers(config)[:2]
    half, whole = measure_sizes(fewer), measure_sizes(config)
    assert 2 * half.count("body", "experts") == whole.count("body", "experts")
    assert config.num_hidden_layers == 4


def test_layers_are_found_under_the_names_that_configs_have():
    assert with_layers(make_model("GPT2", 300).config, 1).n_layer == 1
    text = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 50}
    images = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    both = transformers.Gemma3Config(text_config=text, vision_config=images)
    assert with_layers(both, 2).text_config.num_hidden_layers == 2
    assert with_layers(both, 2).vision_config.num_hidden_layers == 2


def llama_8b() -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def test_a_model_is_measured_whole_where_it_fits():
    assert choose_depths(llama_8b(), GPUS["h200"], options(64 * GIB), 512) == Depths((32,), 32)


def test_a_model_that_does_not_fit_is_measured_with_as_many_layers_as_do():
    depths = choose_depths(llama_8b(), GPUS["h200"], options(20 * GIB), 512)
    # 3.9 GiB of embedding and head and 0.8 of a layer, twice: 16 GiB hold 1 and 8 layers.
    assert depths == Depths((1, 8), 32)
    smaller = choose_depths(llama_8b(), GPUS["h200"], options(14 * GIB), 512)
    assert smaller == Depths((1, 2), 32)


def test_what_does_not_fit_at_all_is_refused():
    with pytest.raises(ModelError, match="not even 1 and 2 of 32 layers"):
        choose_depths(llama_8b(), GPUS["h200"], options(8 * GIB), 512)


def test_time_is_extrapolated_by_layers():
    depths = Depths((2, 4), 32)
    assert depths.extrapolate([5 + 2 * 3, 5 + 4 * 3]) == pytest.approx(5 + 32 * 3)
    assert Depths((32,), 32).extrapolate([7.0]) == 7.0


@pytest.mark.parametrize(
    ("name", "depths"),
    [("Llama", Depths((2,), 2)), ("Llama", Depths((1, 2), 4)), ("Gemma2", Depths((2, 4), 6))],
)
def test_a_measurement_does_the_work_that_is_planned(name: str, depths: Depths):
    """The clock counts products instead of seconds; attention is not among them on a CPU."""
    config = tiny_config(name, depths.whole)
    targets = ["top_k:4", "hidden:int8,realized=0,log_z=0"]
    with FlopCounterMode(display=False) as counter:
        measurement = measure_engine(
            config,
            GPUS["h200"],
            options(GIB),
            device="cpu",
            targets=targets,
            lengths=[128],
            seconds=0.1,
            depths=depths,
            clock=counter.get_total_flops,
        )
    sizes = measure_sizes(config)
    with_head, without = (measurement.seconds[kind, 128] for kind in targets)
    assert with_head - without == pytest.approx(count_flops(sizes, 128).head)
    assert without == pytest.approx(2 * sizes.count("body"), rel=1e-6)


def test_the_command_measures_this_machine(tmp_path):
    make_model("Llama", 300).config.save_pretrained(tmp_path)
    torch.set_num_threads(1)
    made, speed, _ = make(
        PlanConfig(
            model=str(tmp_path), measure=True, measure_gib=1.0, length=(64,), targets=("sampled:8",)
        )
    )
    assert speed.gpu.name == "cpu"
    assert speed.source == "measured on this cpu, 1 threads with all 2 layers"
    (rate,) = made.rates
    assert rate.is_measured
    assert rate.tokens_per_s == pytest.approx(1 / speed.measured["sampled:8", 64])
    # A tiny model on one core: between what no machine is too slow for and none is fast enough for.
    assert 100 < rate.tokens_per_s < 1e7
    assert [each.ranks for each in made.memory] == [1], "there is one of this machine"


def test_targets_that_a_teacher_does_not_offer_are_refused():
    config = tiny_config("Llama", 2)
    with pytest.raises(ModelError, match="has layers 0"):
        measure_engine(
            config,
            GPUS["h200"],
            options(GIB),
            device="cpu",
            targets=["features:layers=9"],
            lengths=[64],
            seconds=0.1,
        )
