"""DeepSeek-V3.2's names and configuration: V3's and the indexer's, complete, and honest about what they cannot say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from byrote.checkpoint.architectures import ARCHITECTURES, reading, writing
from byrote.checkpoint.huggingface import export_hf, import_hf, inspect_hf, plan_export, to_transformers
from byrote.checkpoint.v32_config import config_from_v32, config_to_v32
from byrote.checkpoint.v32_names import v32_pieces
from byrote.errors import CheckpointError, ConfigError
from byrote.model.config import DSAConfig, EngramConfig, ModelConfig, ResidualConfig
from byrote.model.transformer import Model
from tests.parity.v3_models import CONFIGS, PLAIN
from tests.tolerances import assert_bitwise


def sparse(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The same with an indexer in every block."""
    attention = DSAConfig(mla=config.attention, index_num_heads=4, index_head_dim=8, index_top_k=3)
    return replace(config, attention=replace(attention, **changes))


SPARSE = {
    name: sparse(config)
    for name, config in CONFIGS.items()
    if config.attention.q_lora_rank and config.attention.rope.layout == "interleaved"
}


@pytest.mark.parametrize("stacked", [False, True])
def test_every_number_of_the_model_is_in_exactly_one_piece(stacked: bool) -> None:
    assert len(SPARSE) >= 4
    for config in SPARSE.values():
        counts = {name: torch.zeros(tensor.shape) for name, tensor in Model(config).state_dict().items() if name != "_extra_state"}
        for piece in v32_pieces(config, stacked=stacked):
            if not piece.is_copy:
                piece.of(counts[piece.target]).add_(1)
        assert all((count == 1).all() for count in counts.values())


def test_names_are_the_releases() -> None:
    names = [piece.name for piece in v32_pieces(sparse(replace(PLAIN, mtp=None)))]
    own = "model.layers.1.self_attn."
    assert [name.removeprefix(own) for name in names if name.startswith(own)] == [
        *("q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight"),
        *("kv_b_proj.weight", "o_proj.weight", "indexer.wq_b.weight", "indexer.wk.weight", "indexer.k_norm.weight"),
        *("indexer.k_norm.bias", "indexer.weights_proj.weight"),
    ]


@pytest.mark.parametrize("name", SPARSE)
def test_the_configuration_survives_the_way_out_and_back(name: str) -> None:
    written = json.loads(json.dumps(config_to_v32(SPARSE[name], "float32", 0, 1)))
    assert written["model_type"] == "deepseek_v32"
    assert (written["index_n_heads"], written["index_head_dim"], written["index_topk"]) == (4, 8, 3)
    assert config_from_v32(written) == SPARSE[name]


@pytest.mark.parametrize("layout", ["release", "transformers"])
@pytest.mark.parametrize("name", SPARSE)
def test_a_folder_out_and_in_again_is_bitwise_the_model(name: str, layout: str, tmp_path: Path) -> None:
    model = Model(SPARSE[name], seed=3)
    assert len(export_hf(model, None, tmp_path / "out", layout=layout, max_shard_bytes=20_000).shards) > 2
    back = import_hf(tmp_path / "out")
    assert back.config == model.config
    want, got = model.state_dict(), back.state_dict()
    assert got.keys() == want.keys()
    for key in want:
        assert_bitwise(got[key], want[key])
    assert inspect_hf(tmp_path / "out").notes == []
    export_hf(back, None, tmp_path / "out", overwrite=True)  # a V3.2 folder may be replaced


def test_an_indexer_that_is_missing_is_named(tmp_path: Path) -> None:
    export_hf(Model(sparse(PLAIN)), None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    plain = {key: value for key, value in config.items() if not key.startswith("index_")} | {"model_type": "deepseek_v3"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"unknown model\.layers\.0\.self_attn\.indexer"):
        import_hf(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"index_topk": None}, "index_topk is None"),
        ({"index_n_heads": 0}, "index_num_heads is 0"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config_from_v32(config_to_v32(sparse(PLAIN), "float32") | changes)


def test_what_v32_has_no_words_for_is_listed_part_by_part() -> None:
    mla = replace(PLAIN.attention, q_lora_rank=None, rope=replace(PLAIN.attention.rope, layout="half"))
    engram = EngramConfig(layers=(1,), rows_per_order=53, head_dim=3)
    odd = replace(sparse(PLAIN, mla=mla), residual=ResidualConfig(), engram=engram)
    for way in (lambda: plan_export(Model(odd), None), lambda: to_transformers(Model(odd))):
        with pytest.raises(ConfigError) as error:
            way()
        for part in ("DeepSeek-V3.2", "residual.kind", "memory in blocks 1", "full-rank", "rope.layout"):
            assert part in str(error.value)


def test_attention_decides_the_architecture_and_mixtures_have_none() -> None:
    assert writing(PLAIN).model_type == "deepseek_v3"
    assert writing(sparse(PLAIN)).model_type == "deepseek_v32"
    mixed = replace(PLAIN, attention=(PLAIN.attention, sparse(PLAIN).attention, PLAIN.attention))
    with pytest.raises(ConfigError, match="DSAConfig, MLAConfig"):
        writing(mixed)
    with pytest.raises(ConfigError, match="'gpt2'; byrote imports deepseek_v3, deepseek_v32"):
        reading({"model_type": "gpt2"})
    assert all(architecture.model_type == name for name, architecture in ARCHITECTURES.items())
