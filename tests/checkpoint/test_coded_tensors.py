"""Folders with FP8 and FP4 weights: every code is decoded by its own scale, and what does not fit together is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from byrote.checkpoint.huggingface import export_hf, import_hf, inspect_hf
from byrote.errors import ByroteError, CheckpointError, ConfigError
from byrote.kernels.scaled_blocks import FP4_BLOCK, dequantize_reference
from byrote.model.config import DSAConfig, ModelConfig, MTPConfig
from byrote.model.transformer import Model
from tests.parity.v3_models import PLAIN
from tests.parity.v4_models import tiny_v4, twin_of
from tests.tolerances import assert_bitwise

BLOCK = (4, 3)  # divides no width of these models
FORM = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
NOT_CODED = ("embed", "head.", "norm", "gate.", "compressor", "weights_proj", "hc", "sink", "tid2eid")
FP32 = ("bias", "ape", "sink", "hc", "k_norm")


def v4_config() -> ModelConfig:
    return replace(twin_of(tiny_v4()).config, mtp=MTPConfig(form="streams"))


CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "V3": lambda: PLAIN,
    "V3.2": lambda: replace(PLAIN, attention=DSAConfig(mla=PLAIN.attention, index_num_heads=4, index_head_dim=8, index_top_k=3)),
    "V4": v4_config,
    "V3 in transformers' names": lambda: PLAIN,
    "V4 in transformers' names": lambda: replace(v4_config(), mtp=None),
}


def released(kind: str, folder: Path) -> dict[str, Tensor]:
    """A folder as DeepSeek publishes them, with random codes and scales, some scales in a file of their own; returns decoded tensors."""
    layout = "transformers" if "transformers" in kind else "release"
    export_hf(Model(CONFIGS[kind](), seed=1), None, folder, layout=layout)
    (folder / "model.safetensors").rename(folder / "plain")
    stored: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    want: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "plain").items():
        if tensor.dim() < 2 or any(part in name for part in NOT_CODED):
            as_is = any(part in name for part in FP32) or not tensor.is_floating_point()
            want[name] = stored[name] = tensor.clone() if as_is else tensor.bfloat16()
            continue
        codes, scale, block = random_codes(tensor.shape, fp4="V4" in kind and ".experts." in name, power="V4" in kind)
        stored[name], want[name] = codes, dequantize_reference(codes, scale, block, torch.bfloat16)
        scale_name = name.removesuffix("weight") + "scale" if kind == "V4" else f"{name}_scale_inv"
        (scales if "down_proj" in name or "w2" in name else stored)[scale_name] = scale
    (folder / "plain").unlink()
    files = {"model-00001-of-00002.safetensors": scales, "model-00002-of-00002.safetensors": stored}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    placed = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    edit_config(folder, quantization_config=FORM | ({"scale_fmt": "ue8m0"} if "V4" in kind else {}), torch_dtype="bfloat16")
    return want


def random_codes(shape: torch.Size, *, fp4: bool, power: bool) -> tuple[Tensor, Tensor, tuple[int, int]]:
    block, (*front, rows, columns) = FP4_BLOCK if fp4 else BLOCK, shape
    codes = torch.randint(0, 256 if fp4 else 127, (*front, rows, columns // 2 if fp4 else columns), dtype=torch.uint8)
    scale = torch.rand(*front, -(-rows // block[0]), -(-columns // block[1])) / 400
    if power:
        scale = torch.randint(110, 120, scale.shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return codes.view(torch.int8 if fp4 else torch.float8_e4m3fn), scale, block


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder, and put them into one file."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_released_folder_is_decoded_tensor_by_tensor_and_computes(kind: str, tmp_path: Path) -> None:
    want = released(kind, tmp_path)
    found, model = inspect_hf(tmp_path), import_hf(tmp_path)
    assert model.config == CONFIGS[kind]()
    assert {"F8_E4M3", "F8_E8M0" if "V4" in kind else "F32"} < set(found.dtypes) and len(found.coded) > 20
    assert found.notes == []
    ours, brought = model.state_dict(), {piece.name: piece for piece in found.pieces}
    for name, tensor in want.items():
        piece = brought.pop(name)
        wide = tensor.float() if piece.target.endswith("ffn.bias") else tensor
        assert_bitwise(piece.of(ours[piece.target]), wide)
    assert not brought
    assert found.num_bytes == sum(ours[target].nbytes for target in {piece.target for piece in found.pieces})
    logits = model.eval()(torch.arange(40)[None] % 53).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_decoded_weights_have_the_dtype_config_json_says(tmp_path: Path) -> None:
    released("V3", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({name: t.float() for name, t in tensors.items() if t.dtype == torch.bfloat16}))
    edit_config(tmp_path, torch_dtype="float32")
    assert {parameter.dtype for parameter in import_hf(tmp_path).parameters()} == {torch.float32}
    edit_config(tmp_path, torch_dtype="int8")
    with pytest.raises(ConfigError, match="torch_dtype is 'int8'"):
        import_hf(tmp_path)


WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(SCALE), f"{WEIGHT} is F8_E4M3 and has no {SCALE}"),
        (lambda t: t.pop(WEIGHT), f"{SCALE} is there and {WEIGHT} is missing"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}), f"{SCALE} is there and {WEIGHT} is BF16, which needs none"),
        (lambda t: t.update({SCALE: t[SCALE][1:].clone()}), rf"{SCALE} has shape .2, 3., .* .10, 9. in blocks of .4, 3. needs .3, 3."),
        (lambda t: t.update({SCALE: t[SCALE].double()}), f"{SCALE} is F64, not F32 or BF16 or F8_E8M0"),
        (lambda t: t.update({f"{WEIGHT[:-6]}input_scale": torch.ones(1)}), "unknown model.layers.0.self_attn.o_proj.input_scale"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].flatten().clone()}), rf"{WEIGHT} is F8_E4M3 and has shape .90,., where a matrix"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:, :-1].clone()}), rf"{WEIGHT} has shape .10, 8., not .10, 9."),
    ],
)  # fmt: skip
def test_codes_and_scales_that_do_not_belong_together_are_named(
    change: Callable[[dict[str, Tensor]], object], named: str, tmp_path: Path
) -> None:
    released("V3", tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=named):
        import_hf(tmp_path)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (None, "coded weights .* and config.json no quantization_config"),
        ("fp8", "quantization_config is 'fp8'"),
        (FORM | {"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq'; byrote reads 'fp8'"),
        (FORM | {"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'"),
        (FORM | {"activation_scheme": "static"}, "quantization_config.activation_scheme is 'static'"),
        (FORM | {"scale_fmt": "e4m3"}, "quantization_config.scale_fmt is 'e4m3'; byrote reads 'ue8m0' or 'float'"),
        (FORM | {"weight_block_size": None}, "quantization_config.weight_block_size is None"),
        (FORM | {"weight_block_size": [128]}, r"quantization_config.weight_block_size is \[128\]"),
        (FORM | {"bits": 4}, "quantization_config.bits is 4, and byrote does not know this field"),
        (FORM | {"weight_block_size": [128, 128]}, "check quantization_config.weight_block_size"),
    ],
)
def test_a_quantization_byrote_does_not_know_is_refused_by_field_and_value(form: Any, named: str, tmp_path: Path) -> None:
    released("V3", tmp_path)
    edit_config(tmp_path, quantization_config=form)
    with pytest.raises(ByroteError, match=named):
        import_hf(tmp_path)
