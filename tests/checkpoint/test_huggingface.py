"""DeepSeek-V3 folders: what is written is what the release would hold, what is read is every bit of it, and nothing is guessed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from byrote.checkpoint import safetensors_folder
from byrote.checkpoint.huggingface import (
    export_hf,
    from_transformers,
    import_hf,
    import_tokenizer,
    inspect_hf,
    to_transformers,
)
from byrote.errors import CapacityError, CheckpointError, ConfigError
from byrote.model.config import ModelConfig, MTPConfig
from byrote.model.transformer import Model
from byrote.tokenizer.bpe import Tokenizer, train_bpe
from tests.parity.v3_models import CONFIGS, PLAIN, random_model, tiny_v3
from tests.tolerances import assert_bitwise


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a rose is a rose is a rose"] * 3, 261)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole export of PLAIN in one weight file, without a tokenizer."""
    export_hf(random_model(), None, tmp_path / "hf")
    return tmp_path / "hf"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of model.safetensors."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_model_to_folder_to_model_to_folder_is_bitwise(
    config: ModelConfig, max_shard_bytes: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = random_model(config)
    export_hf(model, tokenizer, tmp_path / "one", max_shard_bytes=max_shard_bytes)
    again = import_hf(tmp_path / "one")
    assert again.config == config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_bitwise(again.state_dict()[name], tensor)
    export_hf(again, import_tokenizer(tmp_path / "one", config), tmp_path / "two", max_shard_bytes=max_shard_bytes)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_imported_model_computes_and_trains(folder: Path) -> None:
    model, want = import_hf(folder), random_model()
    tokens = torch.randint(0, 261, (2, 9))
    got = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
    assert_bitwise(got.losses["mtp"], want(tokens[:, :-1], targets_BT=tokens[:, 1:]).losses["mtp"])
    sum(got.losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16_stays_bfloat16_and_the_routers_bias_fp32(tmp_path: Path) -> None:
    model = random_model().bfloat16()
    for layer in (1, 2):
        model.blocks[layer].ffn.bias = model.blocks[layer].ffn.bias.float()
    export_hf(model, None, tmp_path / "hf")
    again = import_hf(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert_bitwise(again.blocks[1].ffn.bias, model.blocks[1].ffn.bias)


@pytest.mark.parametrize("layout", ["release", "transformers"])
def test_transformers_reads_an_export_and_computes_the_same(layout: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = from_transformers(tiny_v3(hidden_size=24, moe_intermediate_size=8)).eval()
    model = with_random_mtp(model)
    export_hf(model, None, tmp_path / "hf", layout=layout, max_shard_bytes=6000)
    again = import_hf(tmp_path / "hf").state_dict()
    for name, tensor in model.state_dict().items():
        assert_bitwise(again[name], tensor)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(0, 53, (2, 7))
    with pytest.warns(UserWarning, match="MTP"):
        want = to_transformers(model)
    assert_bitwise(theirs(tokens).logits, want(tokens).logits)


def with_random_mtp(main: Model) -> Model:
    model = Model(replace(main.config, mtp=MTPConfig())).eval()
    model.load_state_dict(model.state_dict() | main.state_dict())
    return model


def test_what_transformers_saves_is_imported_without_the_mtp_it_announces(tmp_path: Path) -> None:
    theirs = tiny_v3()
    assert theirs.config.num_nextn_predict_layers == 1
    theirs.save_pretrained(tmp_path / "hf")
    found = inspect_hf(tmp_path / "hf")
    assert found.config.mtp is None
    assert "announces 1 MTP layers and the files hold none" in found.notes[0]
    want, got = from_transformers(theirs), import_hf(tmp_path / "hf")
    assert got.config == want.config
    for name, tensor in want.state_dict().items():
        assert_bitwise(got.state_dict()[name], tensor)


def test_transformers_reads_the_exported_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_hf(random_model(), tokenizer, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("a rose is é", add_special_tokens=False)["input_ids"] == tokenizer.encode("a rose is é")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (theirs.bos_token_id, theirs.eos_token_id)


def test_mtp_has_the_names_of_the_release_and_copies_of_embedding_and_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    first = {name.removeprefix("model.layers.3.") for name in tensors if name.startswith("model.layers.3.")}
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.norm.weight", "shared_head.head.weight"}
    block = {name.removeprefix("model.layers.2.") for name in tensors if name.startswith("model.layers.2.")}
    assert first == own | block
    assert_bitwise(tensors["model.layers.4.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert_bitwise(tensors["model.layers.4.shared_head.head.weight"], tensors["lm_head.weight"])
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 2


# --- what byrote cannot read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "deepseek_v2"}, "model_type is 'deepseek_v2'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is 'awq'; byrote reads 'fp8'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0"),
        ({"hidden_size": "10"}, "hidden_size is '10'"),
        ({"n_group": None}, "n_group is None"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob is 'no'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.3}}, "attention_factor = 1.3"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim = 1.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], named: str, folder: Path) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ConfigError) as error:
        import_hf(folder)
    assert named in str(error.value)


def test_a_missing_key_is_named_and_an_unknown_one_noted(folder: Path) -> None:
    edit_config(folder, use_magic=True)
    assert "use_magic" in inspect_hf(folder).notes[0]
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "kv_lora_rank"}))
    with pytest.raises(ConfigError, match="has no kv_lora_rank"):
        inspect_hf(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("model.layers.1.mlp.experts.4.up_proj.weight", None, "missing model.layers.1.mlp.experts.4.up_proj.weight"),
        ("model.layers.4.enorm.weight", None, "missing model.layers.4.enorm.weight"),
        ("model.layers.5.enorm.weight", torch.ones(10), "unknown model.layers.5.enorm.weight"),
        ("model.layers.0.self_attn.o_proj.weight", torch.ones(10, 8), r"has shape \(10, 8\), not \(10, 9\)"),
        ("model.layers.0.self_attn.o_proj.weight", torch.ones(10, 9, dtype=torch.int8), "is I8"),
        ("model.layers.2.mlp.experts.1.gate_proj.weight", torch.ones(7, 10).half(), "is F16 and what it is joined with F32"),
        ("model.layers.3.embed_tokens.weight", torch.ones(261, 10), "model.layers.3.embed_tokens.weight differ from the model's own"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(name: str, tensor: torch.Tensor | None, named: str, folder: Path) -> None:
    edit_weights(folder, **{name: tensor})
    with pytest.raises(CheckpointError, match=named):
        import_hf(folder)


def test_copies_of_embedding_and_head_may_be_left_out(folder: Path) -> None:
    copies = [f"model.layers.{layer}.{name}.weight" for layer in (3, 4) for name in ("embed_tokens", "shared_head.head")]
    edit_weights(folder, **dict.fromkeys(copies))
    assert_bitwise(import_hf(folder).embed.weight, random_model().embed.weight)


def test_pickled_weights_are_refused_unopened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*never unpickles"):
        import_hf(folder)


def test_a_damaged_or_misplaced_file_is_named(tmp_path: Path) -> None:
    export_hf(random_model(), None, tmp_path / "hf", max_shard_bytes=20_000)
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        inspect_hf(tmp_path / "hf")
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        inspect_hf(tmp_path / "hf")
    shard.write_bytes(whole)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        inspect_hf(tmp_path / "hf")


def test_a_folder_without_its_index_or_with_pointers_to_its_files_says_what_to_fetch(tmp_path: Path) -> None:
    export_hf(random_model(), None, tmp_path, max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 20000\n")
    with pytest.raises(CheckpointError, match=rf"{shard.name} is Git LFS's note .* git lfs pull"):
        inspect_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors\.index\.json"):
        inspect_hf(tmp_path)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        import_hf(tmp_path / "nothing")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="261 tokens and the model 260"):
        export_hf(Model(replace(PLAIN, vocab_size=260)), tokenizer, tmp_path / "hf")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_shards_keep_to_the_limit_and_the_index_is_true(tmp_path: Path) -> None:
    limit = 4000
    plan = export_hf(random_model(), None, tmp_path / "hf", max_shard_bytes=limit)
    assert set(plan.files) == set(contents(tmp_path / "hf"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.num_bytes
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "hf" / file, framework="pt") as weights:
            assert weights.metadata() == {"format": "pt"}
            sizes = {name: weights.get_tensor(name).nbytes for name in weights.keys()}  # noqa: SIM118
        assert set(sizes) == {name for name, placed in index["weight_map"].items() if placed == file}
        assert sum(sizes.values()) <= limit or len(sizes) == 1


@pytest.mark.parametrize("writes", [0, 1, 3])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_an_export_that_fails_leaves_the_old_folder_or_none(
    writes: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_hf(random_model(), None, tmp_path / "old")
    before, real, done = contents(tmp_path / "old"), safetensors_folder.write_new, []

    def failing(path: Path, parts: Any) -> None:
        if len(done) == writes:
            path.write_bytes(b"torn")
            raise error
        done.append(path)
        real(path, parts)

    monkeypatch.setattr(safetensors_folder, "write_new", failing)
    for name, overwrite in (("old", True), ("new", False)):
        done.clear()
        with pytest.raises(CapacityError if isinstance(error, OSError) else KeyboardInterrupt):
            export_hf(random_model(), None, tmp_path / name, max_shard_bytes=20_000, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["old"]
    assert contents(tmp_path / "old") == before


def test_only_a_v3_model_is_overwritten_and_only_when_asked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--overwrite"):
        export_hf(random_model(), None, folder)
    other = random_model(CONFIGS["dense"])
    export_hf(other, None, folder, overwrite=True)
    assert import_hf(folder).config == other.config
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not overwritten"):
        export_hf(other, None, tmp_path / "letters", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        export_hf(other, None, tmp_path / "letters" / "mother.txt", overwrite=True)
    assert contents(tmp_path / "letters") == {"mother.txt": b"dear"}


# --- memory -----------------------------------------------------------------------------------------------------------

GROWTH = """
import sys
from pathlib import Path
import byrote
from byrote.checkpoint.huggingface import import_hf, inspect_hf
resident = lambda key: 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
model_bytes = inspect_hf(sys.argv[1]).num_bytes
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
model = import_hf(sys.argv[1])
print(model_bytes, resident("VmHWM") - before, int("torch._dynamo" in sys.modules))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not say how much memory a process had at most")
def test_an_import_needs_memory_for_the_model_and_one_file(tmp_path: Path) -> None:
    moe, limit = replace(PLAIN.moe, expert_hidden=512, num_experts=12), 2 << 20
    plan = export_hf(Model(replace(PLAIN, dim=256, moe=moe, mtp=None)), None, tmp_path / "hf", max_shard_bytes=limit)
    assert len(plan.shards) > 16
    out = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path / "hf")], capture_output=True, text=True, check=True).stdout
    model_bytes, growth, has_compiler = map(int, out.split())
    assert model_bytes == plan.num_bytes
    assert growth <= model_bytes + limit + (8 << 20)  # the last: what Python and PyTorch load on the way
    assert not has_compiler  # PyTorch's, which takes seconds to import


def test_folders_need_no_transformers_and_the_rest_says_how_to_install_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = import_hf(folder)
    export_hf(model, None, tmp_path / "again")
    with pytest.raises(ConfigError, match=r"pip install byrote\[hf\]"):
        to_transformers(model)
