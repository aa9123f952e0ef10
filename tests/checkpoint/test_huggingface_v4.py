"""DeepSeek-V4 in and out: transformers' class, the release's folder, a folder in transformers' names, and byrote's own checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV4ForCausalLM

import byrote
from byrote.checkpoint.huggingface import export_hf, from_transformers, import_hf, to_transformers
from byrote.errors import CheckpointError, ConfigError
from byrote.model.config import MTPConfig
from byrote.model.transformer import Model
from tests.parity.v4_models import VOCAB, tiny_v4
from tests.tolerances import assert_bitwise

TOKENS = torch.arange(60).reshape(2, 30) * 7 % VOCAB


@pytest.fixture(scope="module")
def theirs() -> DeepseekV4ForCausalLM:
    return tiny_v4(3)


@pytest.fixture(scope="module")
def ours(theirs: DeepseekV4ForCausalLM) -> Model:
    return from_transformers(theirs)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert_bitwise(tensor, right[name])


@torch.no_grad()
def test_there_and_back_is_bitwise_and_computes_the_same(theirs: DeepseekV4ForCausalLM, ours: Model) -> None:
    back = to_transformers(ours)
    assert_same(back.state_dict(), theirs.state_dict())
    back.set_experts_implementation("eager")  # their default wants widths of 16 bytes
    assert_bitwise(back(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits)


@pytest.mark.parametrize("layout", ["release", "transformers"])
@torch.no_grad()
def test_the_exported_folder_is_read_by_us_and_by_transformers(
    layout: str, theirs: DeepseekV4ForCausalLM, ours: Model, tmp_path: Path
) -> None:
    plan = export_hf(ours, None, tmp_path / "hf", layout=layout, max_shard_bytes=20_000)
    assert len(plan.shards) > 2
    assert_same(import_hf(tmp_path / "hf").state_dict(), ours.state_dict())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, experts_implementation="eager")
    assert_bitwise(read(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mtp_goes_out_and_comes_back_in_the_releases_layout_alone(dtype: torch.dtype, ours: Model, tmp_path: Path) -> None:
    model = Model(replace(ours.config, mtp=MTPConfig(depth=2, form="streams")), seed=4).to(dtype)
    for module in model.modules():
        if hasattr(module, "router") and module.bias is not None:
            module.bias = module.bias.float()
    export_hf(model, None, tmp_path / "hf", max_shard_bytes=20_000)
    again = import_hf(tmp_path / "hf")
    assert again.config == model.config
    assert_same(again.state_dict(), model.state_dict())
    with pytest.raises(ConfigError, match=r"'transformers' has no place for mtp\.0\."):
        export_hf(model, None, tmp_path / "other", layout="transformers")
    assert not (tmp_path / "other").exists()


def test_what_save_pretrained_writes_is_read(theirs: DeepseekV4ForCausalLM, ours: Model, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert_same(import_hf(tmp_path / "hf").state_dict(), ours.state_dict())


def test_a_folder_in_transformers_names_is_read_and_a_missing_tensor_is_named(
    theirs: DeepseekV4ForCausalLM, ours: Model, tmp_path: Path
) -> None:
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict() | {"num_nextn_predict_layers": 0}, default=str))
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(import_hf(tmp_path).state_dict(), ours.state_dict())
    del tensors["model.layers.1.self_attn.sinks"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.1\.self_attn\.sinks"):
        import_hf(tmp_path)


@torch.no_grad()
def test_byrotes_own_checkpoint_keeps_the_table_of_token_routing(ours: Model, tmp_path: Path) -> None:
    byrote.save(ours, tmp_path / "run")
    loaded, _ = byrote.load(tmp_path / "run")
    assert_same(loaded.state_dict(), ours.state_dict())
    assert_bitwise(loaded.eval()(TOKENS).logits, ours.eval()(TOKENS).logits)
