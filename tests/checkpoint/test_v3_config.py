"""DeepSeek-V3's names and configuration: complete, as released, and honest about what they cannot say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from byrote.checkpoint.huggingface import export_hf, plan_export, to_transformers
from byrote.checkpoint.v3_config import config_from_v3, config_to_v3
from byrote.checkpoint.v3_names import v3_pieces
from byrote.errors import ConfigError
from byrote.model.config import EngramConfig, MoEConfig, ResidualConfig
from byrote.model.presets import load_preset
from byrote.model.transformer import Model
from tests.parity.v3_models import CONFIGS, PLAIN

# --- names and configuration of the release ---------------------------------------------------------------------------


def test_every_number_of_the_model_is_in_exactly_one_piece() -> None:
    for config in CONFIGS.values():
        for stacked in (False, True):
            counts = {name: torch.zeros(tensor.shape) for name, tensor in Model(config).state_dict().items() if name != "_extra_state"}
            for piece in v3_pieces(config, stacked=stacked):
                if not piece.is_copy:
                    piece.of(counts[piece.target]).add_(1)
            assert all((count == 1).all() for count in counts.values())


def test_the_v3_preset_has_the_releases_configuration() -> None:
    written = config_to_v3(load_preset("v3"), "bfloat16", 0, 1)
    for key, value in {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "topk_method": "noaux_tc",
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "rope_theta": 10000,
        "vocab_size": 129280,
    }.items():
        assert written[key] == value
    assert written["rope_scaling"] == {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    assert config_from_v3(written) == load_preset("v3")
    names = {piece.name for piece in v3_pieces(load_preset("v3"))}
    assert {"model.layers.60.mlp.experts.255.down_proj.weight", "model.layers.61.shared_head.head.weight"} <= names


# --- what V3 cannot express -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"residual": ResidualConfig(kind="mhc")}, "residual.kind is 'mhc'"),
        ({"residual": ResidualConfig(kind="hc")}, "residual.kind is 'hc'"),
        ({"engram": EngramConfig(layers=(1,), rows_per_order=20, head_dim=2)}, "engram (memory in blocks 1)"),
        ({"swiglu_limit": 10.0}, "swiglu_limit is 10.0"),
        ({"norm_eps": 1e-5}, "latent_norm_eps"),
        ({"moe": MoEConfig(num_experts=4, top_k=2, expert_hidden=4, score="sqrt_softplus")}, "moe.score is 'sqrt_softplus'"),
        ({"moe": MoEConfig(num_experts=4, top_k=2, expert_hidden=4, num_shared=0)}, "moe.num_shared is 0"),
        ({"moe": MoEConfig(num_experts=4, top_k=2, expert_hidden=4, num_groups=4, top_groups=2)}, "a group of experts has one member"),
    ],
)
def test_a_part_v3_cannot_express_is_named_and_nothing_written(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = Model(replace(PLAIN, mtp=None, **changes))
    for attempt in (lambda: export_hf(model, None, tmp_path / "hf"), lambda: to_transformers(model)):
        with pytest.raises(ConfigError) as error:
            attempt()
        assert named in str(error.value)
        assert "train with" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_all_parts_in_the_way_are_named_at_once() -> None:
    changes = {"residual": ResidualConfig(), "swiglu_limit": 7.0, "engram": EngramConfig(layers=(0, 2), rows_per_order=20, head_dim=2)}
    with pytest.raises(ConfigError, match=r"residual.*(?s:.)*engram.*0, 2(?s:.)*swiglu_limit"):
        plan_export(Model(replace(PLAIN, **changes)), None)
