"""DeepSeek-V4 in and out: transformers' class, the release's folder, a folder in transformers' names, and byrote's own checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV4ForCausalLM

import byrote
from byrote.checkpoint.huggingface import export_hf, from_transformers, import_hf, to_transformers
from byrote.errors import CheckpointError
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


@torch.no_grad()
def test_the_exported_folder_is_read_by_us_and_by_transformers(theirs: DeepseekV4ForCausalLM, ours: Model, tmp_path: Path) -> None:
    export_hf(ours, None, tmp_path / "hf")
    assert_same(import_hf(tmp_path / "hf").state_dict(), ours.state_dict())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, experts_implementation="eager")
    assert_bitwise(read(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits)


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
