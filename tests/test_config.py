"""Configurations survive the trip through JSON and the command line, and every mistake is named."""

import json
from dataclasses import dataclass, field, replace

import pytest

from byrote.config import REQUIRED, apply_overrides, describe, format_value, from_dict, nearest, to_dict
from byrote.errors import ConfigError
from byrote.model.config import (
    DSAConfig,
    EngramConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeConfig,
    V4AttentionConfig,
    YarnConfig,
)
from byrote.train.run import DataConfig, RunConfig, SourceConfig


def attention(**changes) -> MLAConfig:
    return replace(MLAConfig(num_heads=3, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=5), **changes)


def v4_attention() -> V4AttentionConfig:
    sizes = {"num_heads": 2, "head_dim": 6, "rope_head_dim": 2, "q_lora_rank": 5, "o_groups": 1, "o_lora_rank": 3, "sliding_window": 7}
    return V4AttentionConfig(**sizes, compress_ratios=(0, 4, 128), index_num_heads=1, index_head_dim=3, index_top_k=2)


def run_config(**model) -> RunConfig:
    parts = {"vocab_size": 257, "dim": 24, "num_layers": 3, "attention": attention(), "ffn_hidden": 31} | model
    return RunConfig(name="odd", model=ModelConfig(**parts), data=DataConfig(sources=(SourceConfig(path="notes"),)))


def full_config() -> RunConfig:
    return run_config(
        attention=attention(rope=RopeConfig(theta=5e5, yarn=YarnConfig(factor=4, original_positions=128))),
        moe=MoEConfig(num_experts=7, top_k=2, expert_hidden=11),
        engram=EngramConfig(layers=(0, 2), rows_per_order=(101, 257), head_dim=3, max_order=3),
        mtp=MTPConfig(),
    )


@pytest.mark.parametrize("config", [run_config(), full_config()])
def test_a_config_survives_json(config):
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_reading_restores_tuples_and_both_sides_of_a_union():
    read = from_dict(EngramConfig, {"layers": [1], "rows_per_order": 101, "head_dim": 3})
    assert (read.layers, read.rows_per_order) == ((1,), 101)
    assert from_dict(EngramConfig, {"layers": [1], "rows_per_order": [5, 7], "head_dim": 3}).rows_per_order == (5, 7)


def test_reading_names_every_unknown_key_with_its_nearest_and_every_missing_one():
    data = to_dict(full_config())
    data["model"]["moe"]["topk"] = data["model"]["moe"].pop("top_k")
    data["model"]["moe"]["sore"] = "sigmoid"
    with pytest.raises(ConfigError) as error:
        from_dict(RunConfig, data)
    for part in ("model.moe.topk (nearest: model.moe.top_k)", "model.moe.sore (nearest: model.moe.score)", "missing key model.moe.top_k"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("model", "dim"), "24", "model.dim is '24' (str); allowed: int"),
        (("model", "dim"), True, "model.dim is True (bool); allowed: int"),
        (("model", "dim"), 24.0, "model.dim is 24.0 (float); allowed: int"),
        (("optim", "betas"), [0.9], "optim.betas has 1 values; it needs exactly 2"),
        (("optim", "betas"), [0.9, None], "optim.betas[1] is None (NoneType); allowed: float"),
        (("model", "mtp"), 1, "model.mtp is 1 (int); allowed: JSON or none"),
        (("data", "sources"), [{"path": 3}], "data.sources[0].path is 3 (int); allowed: str"),
        (("model", "engram", "rows_per_order"), "x", "model.engram.rows_per_order is 'x' (str); allowed: int or int,…"),
    ],
)
def test_reading_a_wrong_type_names_the_dotted_path(path, value, expected):
    data = to_dict(full_config())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError) as error:
        from_dict(RunConfig, data)
    assert expected in str(error.value)


def test_reading_something_that_is_no_dictionary_is_an_error():
    with pytest.raises(ConfigError, match="the configuration is"):
        from_dict(RunConfig, [1, 2])


def test_overrides_are_read_by_the_type_of_the_field():
    changed = apply_overrides(
        full_config(),
        {
            "name": "none",
            "model.dim": "48",
            "model.moe.normalize_gate": "off",
            "model.attention.rope.yarn.factor": "8",
            "model.engram.layers": "1,2",
            "model.engram.rows_per_order": "4099",
            "optim.lr": "1e-3",
            "optim.betas": "0.8,0.99",
            "train.steps": "none",
            "train.seconds": "20",
        },
    )
    assert changed.name == "none"
    assert changed.model.dim == 48
    assert changed.model.moe.normalize_gate is False
    assert changed.model.attention.rope.yarn == YarnConfig(factor=8.0, original_positions=128)
    assert changed.model.engram.layers == (1, 2)
    assert changed.model.engram.rows_per_order == 4099
    assert (changed.optim.lr, changed.optim.betas) == (1e-3, (0.8, 0.99))
    assert (changed.train.steps, changed.train.seconds) == (None, 20.0)


def test_no_override_is_no_change():
    assert apply_overrides(full_config(), {}) == full_config()


@pytest.mark.parametrize("text", ["5,7", "[5, 7]", " 5, 7 ,"])
def test_a_tuple_is_given_with_commas_or_as_json(text):
    assert apply_overrides(full_config(), {"model.engram.rows_per_order": text}).model.engram.rows_per_order == (5, 7)


def test_fields_that_constrain_each_other_change_together_in_any_order():
    raised = apply_overrides(full_config(), {"model.moe.top_k": "12", "model.moe.num_experts": "14"})
    assert raised == apply_overrides(full_config(), {"model.moe.num_experts": "14", "model.moe.top_k": "12"})
    assert (raised.model.moe.num_experts, raised.model.moe.top_k) == (14, 12)


@pytest.mark.parametrize("part", ["engram", "mtp", "moe"])
def test_none_switches_a_part_off(part):
    assert getattr(apply_overrides(full_config(), {f"model.{part}": "none"}).model, part) is None


def test_a_part_whose_other_fields_have_defaults_is_switched_on_by_one_field():
    assert apply_overrides(run_config(), {"model.mtp.depth": "2"}).model.mtp == MTPConfig(depth=2)
    assert apply_overrides(run_config(), {"model.mtp": "{}"}).model.mtp == MTPConfig()


def test_a_part_that_needs_more_says_what_and_then_takes_it():
    with pytest.raises(ConfigError, match=r"model.engram is none.*--model.engram.rows_per_order INT OR INT,… --model.engram.head_dim INT"):
        apply_overrides(run_config(), {"model.engram.layers": "1"})
    given = {"model.engram.layers": "1", "model.engram.rows_per_order": "11", "model.engram.head_dim": "3"}
    assert apply_overrides(run_config(), given).model.engram == EngramConfig(layers=(1,), rows_per_order=11, head_dim=3)


def test_sources_are_given_by_path_or_as_json_with_weights():
    assert apply_overrides(run_config(), {"data.sources": "a,b.txt"}).data.sources == (SourceConfig(path="a"), SourceConfig(path="b.txt"))
    weighted = apply_overrides(run_config(), {"data.sources": '[{"path": "a,b", "weight": 2}]'}).data.sources
    assert weighted == (SourceConfig(path="a,b", weight=2.0),)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.moe.topk": "4"}, "model.moe.topk (nearest: model.moe.top_k)"),
        ({"optm.lr": "4"}, "optm.lr (nearest: optim.lr)"),
        ({"model.dim": "4.5"}, "model.dim is '4.5'; allowed: int"),
        ({"optim.lr": "nan"}, "optim.lr is 'nan'; allowed: float"),
        ({"model.moe.normalize_gate": "perhaps"}, "model.moe.normalize_gate is 'perhaps'; allowed: bool"),
        ({"model.engram.rows_per_order": "five"}, "model.engram.rows_per_order is 'five'; allowed: int or int,…"),
        ({"optim.betas": "0.9"}, "optim.betas has 1 values; it needs exactly 2"),
        ({"data.sources": "[{"}, "data.sources starts like JSON but is not"),
        ({"model.mtp": "yes"}, "model.mtp is 'yes'; allowed: JSON or none"),
        ({"model.engram": "none", "model.engram.head_dim": "3"}, "model.engram is set as a whole and model.engram.head_dim inside it"),
        ({"optim.matrix": "sgd"}, "optim.matrix is 'sgd'; allowed: muon, adamw"),
    ],
)
def test_an_override_that_cannot_be_used_says_what_is_allowed(overrides, expected):
    with pytest.raises(ConfigError) as error:
        apply_overrides(full_config(), overrides)
    assert expected in str(error.value)


def test_every_described_value_can_be_given_back_as_text():
    config = full_config()
    for option in describe(config):
        assert apply_overrides(config, {option.name: format_value(option.default)}) == config, option.name


def test_describing_carries_types_defaults_and_the_comments_of_the_source():
    options = {option.name: option for option in describe(full_config())}
    assert options["model.moe.top_k"].default == 2
    assert options["optim.lr"].doc == "matrices: after RMS matching, comparable with AdamW's"
    assert options["model.engram.rows_per_order"].type == "int or int,…"
    assert options["model.engram"].doc.startswith("Conditional memory")
    assert "model.residual" not in options, "a part that cannot be none is set by its fields"


def test_of_a_part_with_several_kinds_an_instance_lists_its_own_fields_and_a_class_those_of_all():
    own = {option.name for option in describe(full_config())}
    every = [option.name for option in describe(RunConfig)]
    assert "model.attention.kv_lora_rank" in own
    assert "model.attention.sliding_window" not in own
    assert {"model.attention", "model.attention.kv_lora_rank", "model.attention.sliding_window"} <= set(every)
    assert len(every) == len(set(every))


def test_of_several_kinds_of_part_the_one_is_read_whose_keys_are_given():
    data = to_dict(full_config())
    data["model"]["attention"]["q_lora_ranks"] = data["model"]["attention"].pop("q_lora_rank")
    with pytest.raises(
        ConfigError, match=r"MLAConfig cannot be read: unknown key model.attention.q_lora_ranks \(nearest: model.attention.q_lora_rank\)"
    ):
        from_dict(RunConfig, data)
    window = to_dict(v4_attention())
    assert from_dict(ModelConfig, to_dict(run_config().model) | {"attention": window}).attention == v4_attention()
    assert apply_overrides(run_config(), {"model.attention": json.dumps(window)}).model.attention == v4_attention()


def test_attention_may_be_one_for_each_block():
    sparse = DSAConfig(mla=attention(), index_num_heads=2, index_head_dim=8, index_top_k=4)
    mixed = run_config(attention=(attention(), sparse, replace(v4_attention(), compress_ratios=(4,))))
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(mixed)))) == mixed
    text = format_value(mixed.model.attention)
    assert apply_overrides(run_config(), {"model.attention": text}) == mixed
    assert {option.name for option in describe(mixed) if option.name.startswith("model.attention")} == {"model.attention"}
    with pytest.raises(ConfigError, match=r"unknown option: model\.attention\.num_heads"):
        apply_overrides(mixed, {"model.attention.num_heads": "4"})
    assert apply_overrides(run_config(attention=sparse), {"model.attention.mla.num_heads": "5"}).model.attention.mla.num_heads == 5


def test_a_checkpoint_from_before_there_were_kinds_of_attention_is_read():
    data = to_dict(full_config())
    for part, key in (("moe", "num_hash_layers"), ("mtp", "form")):
        del data["model"][part][key]
    assert from_dict(RunConfig, data) == full_config()


def test_describing_a_class_marks_fields_without_default():
    options = {option.name: option for option in describe(RunConfig)}
    assert options["model.dim"].default is REQUIRED
    assert options["model.engram.head_dim"].default is REQUIRED
    assert options["train.device"].default == "auto"


@dataclass(frozen=True)
class Documented:
    above: int = 1
    """A string below the field."""
    beside: int = 2  # a comment beside it
    neither: int = 3
    wrapped: tuple[int, ...] = field(
        default=(1, 2),
    )  # a comment behind the last line


def test_docs_come_from_comments_and_from_strings_below():
    docs = {option.name: option.doc for option in describe(Documented)}
    assert docs == {
        "above": "A string below the field.",
        "beside": "a comment beside it",
        "neither": "",
        "wrapped": "a comment behind the last line",
    }


def test_a_class_without_source_is_described_without_docs():
    scope: dict = {}
    exec("from dataclasses import dataclass\n@dataclass\nclass Bare:\n    size: int = 3  # lost\n", scope)
    assert [tuple(option) for option in describe(scope["Bare"])] == [("size", "int", 3, "")]


def test_nearest_finds_a_typing_error_and_survives_an_empty_choice():
    assert nearest("genrate", ["train", "generate", "eval"]) == "generate"
    assert nearest("x", []) == ""
