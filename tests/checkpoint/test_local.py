"""What is saved comes back bit by bit; what was touched in between is noticed and named; what stands survives any failure."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import byrote
from byrote.checkpoint import local, manifest
from byrote.checkpoint.atomic import ASIDE, TEMPORARY
from byrote.checkpoint.local import TrainingState, load, load_training, save
from byrote.checkpoint.manifest import MANIFEST, read_manifest
from byrote.checkpoint.runs import latest, prune, step_folder
from byrote.checkpoint.tensors import read_tensors, tensor_file
from byrote.errors import ByroteError, CapacityError, CheckpointError, ConfigError
from byrote.model.config import EngramConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig, ResidualConfig
from byrote.model.transformer import Model
from byrote.tokenizer.bpe import Tokenizer, train_bpe

ROOT = Path(__file__).parents[2]
VOCAB = 23
ENGRAM = EngramConfig(layers=(1,), rows_per_order=29, head_dim=3, num_heads=2, max_order=3)
PLAIN = ModelConfig(
    vocab_size=VOCAB,
    dim=12,
    num_layers=1,
    ffn_hidden=20,
    max_positions=64,
    attention=MLAConfig(num_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4),
    residual=ResidualConfig(kind="plain"),
    moe=None,
    engram=None,
    mtp=None,
)
WHOLE = replace(
    PLAIN,
    num_layers=3,
    residual=ResidualConfig(kind="mhc", num_streams=2),
    moe=MoEConfig(num_experts=4, top_k=2, expert_hidden=5),
    engram=ENGRAM,
    mtp=MTPConfig(),
)
CANONICAL = replace(WHOLE, engram=replace(ENGRAM, canonical_vocab=7))
BF16_TABLE = replace(WHOLE, engram=replace(ENGRAM, table_dtype="bfloat16"))
FREE = replace(WHOLE, residual=ResidualConfig(kind="hc", num_streams=3), moe=None)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
MODELS = {"plain": PLAIN, "whole": WHOLE, "canonical map": CANONICAL, "bf16 table": BF16_TABLE, "hc": FREE}


def build(config: ModelConfig, *, seed: int = 0, state_dim: int = 1) -> Model:
    """A model in which no tensor keeps its initial value by chance."""
    model = Model(config, seed=seed, table_state_dim=state_dim)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    if model.memory is not None:
        model.memory.store.state_NS.uniform_(generator=generator)
        model.memory.store.visits_N.random_(0, 1000, generator=generator)
        if config.engram.canonical_vocab is not None:
            model.memory.set_canonical(torch.arange(VOCAB) * 3 % config.engram.canonical_vocab)
    return model


def training(step: int = 40) -> TrainingState:
    return TrainingState(
        step=step,
        optimizer={"momentum/head.weight": torch.randn(VOCAB, 12), "step/embed.weight": torch.tensor(40.0)},
        optimizer_meta={"format": 1, "optimizers": {"head.weight": "muon"}},
        loop={"loader": {"seed": 2**61, "source": "Zoë"}, "loads": [[1, 2], [3, 4]], "loss": float("inf")},
        tensors={"rng": torch.get_rng_state(), "nothing": torch.empty(0, 3)},
    )


def contents(model: Model) -> dict[str, Tensor]:
    """Everything that makes the model what it is."""
    tensors = dict(model.state_dict())
    if model.memory is not None:
        tensors["rows"] = model.memory.store.vectors_NE
        tensors["pad"] = torch.tensor(model.memory.hash.pad)
        if model.memory.canonical_V is not None:
            tensors["canonical"] = model.memory.canonical_V
    return tensors


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Names, dtypes and every bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].reshape(-1).view(torch.uint8).equal(right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def forward(model: Model) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(14).view(2, 7)).logits


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["to save is not to load, and to load is not to save " * 3] * 4, 265)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint with every kind of file in it."""
    folder = tmp_path / "saved"
    save(build(CANONICAL), folder, tokenizer=tokenizer, training=training())
    return folder


# --- bit by bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_is_the_saved_one_and_so_is_what_it_saves(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(config).to(dtype)
    save(model, tmp_path / "first")
    loaded, tokenizer = load(tmp_path / "first")
    assert tokenizer is None
    assert loaded.config == config
    assert same(contents(loaded), contents(model))
    save(loaded, tmp_path / "second")
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_loaded_model_computes_the_same(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config)
    save(model, tmp_path / "it")
    loaded = load(tmp_path / "it").model
    assert not loaded.training
    assert forward(loaded).equal(forward(model.eval()))


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    model, state = build(CANONICAL, state_dim=6), training()
    save(model, tmp_path / "it", training=state)
    other = build(CANONICAL, seed=5, state_dim=6)
    held = dict(other.named_parameters())
    back = load_training(tmp_path / "it", other)
    assert same(contents(other), contents(model))
    assert other.memory.store.state_NS.equal(model.memory.store.state_NS)
    assert other.memory.store.visits_N.equal(model.memory.store.visits_N)
    assert all(held[name] is param for name, param in other.named_parameters()), "an optimizer built before must see what was loaded"
    assert same(back.optimizer, state.optimizer) and same(back.tensors, state.tensors)
    assert (back.step, back.optimizer_meta, back.loop) == (state.step, state.optimizer_meta, state.loop)


def test_optimizers_go_on_with_what_was_saved(tmp_path: Path) -> None:
    from byrote.optim.groups import OptimizerState, build_optimizers
    from byrote.train.run import OptimConfig

    def step(model: Model, optimizers) -> None:
        torch.manual_seed(3)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizers.step()

    model, other = build(PLAIN), build(PLAIN, seed=9)
    optimizers, others = build_optimizers(model, OptimConfig()), build_optimizers(other, OptimConfig())
    step(model, optimizers)
    live = optimizers.state_dict()
    save(model, tmp_path / "it", training=replace(training(), optimizer=live.tensors, optimizer_meta=live.meta))
    back = load_training(tmp_path / "it", other)
    others.load_state_dict(OptimizerState(back.optimizer, back.optimizer_meta))
    step(model, optimizers)
    step(other, others)
    assert same(contents(other), contents(model))


def test_a_fresh_run_without_optimizer_state_is_saved_too(tmp_path: Path) -> None:
    state = TrainingState(step=0, optimizer={}, optimizer_meta={}, loop={})
    save(build(PLAIN), tmp_path / "it", training=state)
    assert load_training(tmp_path / "it", build(PLAIN)) == state


def test_the_tokenizer_comes_back(saved: Path, tokenizer: Tokenizer) -> None:
    loaded = load(saved).tokenizer
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_the_table_is_mapped_and_training_on_it_leaves_the_file_alone(saved: Path) -> None:
    before = snapshot(saved)
    store = load(saved).model.memory.store
    if Path("/proc/self/maps").exists():
        assert str(saved / local.TABLE) in Path("/proc/self/maps").read_text()
    store.vectors_NE.add_(1)
    assert snapshot(saved) == before
    shutil.rmtree(saved)
    assert store.vectors_NE.isfinite().all()


def test_a_model_can_be_saved_over_the_checkpoint_it_was_loaded_from(saved: Path) -> None:
    model, before = load(saved).model, snapshot(saved)
    save(model, saved)
    assert snapshot(saved).items() <= before.items() | {(MANIFEST, (saved / MANIFEST).read_bytes())}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_lower_dtype_is_for_matrices_and_spares_the_islands(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config)
    save(model, tmp_path / "it")
    loaded = load(tmp_path / "it", dtype=torch.bfloat16).model
    roles = model.param_roles()
    for name, tensor in loaded.state_dict().items():
        is_island = roles.get(name, "buffer") in ("norm", "mix", "conv", "router", "buffer")
        assert is_island or tensor.dtype == torch.bfloat16
        assert not is_island or tensor.dtype == model.state_dict()[name].dtype
    wide, narrow = forward(model.eval()), forward(loaded).float()
    assert (narrow - wide).abs().max() < 0.05 * wide.abs().max()


def test_a_higher_dtype_raises_everything(tmp_path: Path) -> None:
    save(build(WHOLE).to(torch.bfloat16), tmp_path / "it")
    loaded = load(tmp_path / "it", dtype=torch.float32).model
    assert {param.dtype for param in loaded.parameters()} == {torch.float32}


def test_a_dtype_that_cannot_compute_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch\.int8; allowed: torch\.float32"):
        load(saved, dtype=torch.int8)


def test_the_files_are_what_other_programs_read(saved: Path) -> None:
    model = build(CANONICAL)
    assert same(load_file(saved / local.MODEL), model.state_dict())
    assert same(load_file(saved / local.TABLE), {"vectors_NE": model.memory.store.vectors_NE, "canonical_V": model.memory.canonical_V})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_odd_shape_survives_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.randint(0, 2, (7, 257)).to(dtype)
    tensors = {"odd": whole, "transposed": whole.t(), "scalar": whole[0, 0], "none": whole[:0], "bytes": torch.arange(5).byte()}
    (tmp_path / "file").write_bytes(b"".join(tensor_file(tensors)))
    assert same(read_tensors(tmp_path / "file"), tensors)
    assert same(load_file(tmp_path / "file"), tensors)


def test_numbers_are_aligned_in_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3).bfloat16(), "b": torch.zeros(5).long(), "c": torch.zeros(7), "d": torch.zeros(1).bool()}
    (tmp_path / "file").write_bytes(b"".join(tensor_file(tensors)))
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0


def test_a_tensor_larger_than_a_piece_survives_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byrote.checkpoint.tensors._PIECE", 40)
    tensors = {"a": torch.randn(7, 9), "b": torch.randn(3).double()}
    (tmp_path / "file").write_bytes(b"".join(tensor_file(tensors)))
    assert same(load_file(tmp_path / "file"), tensors)


# --- what was touched is named ----------------------------------------------------------------------------------------


def test_the_manifest_says_what_is_there(saved: Path) -> None:
    found = read_manifest(saved)
    assert (found.format, found.byrote, found.step, found.table_generations) == (1, byrote.__version__, 40, (40,))
    listed = {file.name: file.bytes for file in found.files}
    assert listed == {name: len(data) for name, data in snapshot(saved).items() if name != MANIFEST}
    assert {"model.safetensors", "table.safetensors", "config.json", "tokenizer/tokenizer.json", "trainer.json"} < listed.keys()


def test_a_model_without_memory_has_no_table_generation(tmp_path: Path) -> None:
    save(build(PLAIN), tmp_path / "it")
    assert read_manifest(tmp_path / "it").table_generations == ()
    assert read_manifest(tmp_path / "it").step is None


ALL_FILES = [
    "config.json",
    MANIFEST,
    "model.safetensors",
    "optimizer.safetensors",
    "table.safetensors",
    "table_state.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "trainer.json",
    "trainer.safetensors",
]


def test_the_list_of_files_above_is_complete(saved: Path) -> None:
    assert sorted(snapshot(saved)) == ALL_FILES


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [flip_a_byte, cut, lengthen, Path.unlink])
@pytest.mark.parametrize("name", ALL_FILES)
def test_every_harmed_file_is_named(name: str, harm: Callable[[Path], None], saved: Path) -> None:
    harm(saved / name)
    for read in (load, lambda path: load_training(path, build(CANONICAL))):
        with pytest.raises(CheckpointError, match=name if name != MANIFEST else "manifest.json|no manifest"):
            read(saved)


def test_an_extra_file_is_named_and_a_file_managers_is_not(saved: Path) -> None:
    (saved / ".DS_Store").write_bytes(b"where the window was")
    load(saved)
    (saved / "pickle.bin").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"pickle\.bin.*elsewhere"):
        load(saved)


def test_without_verifying_sizes_still_count_and_bytes_do_not(saved: Path) -> None:
    flip_a_byte(saved / local.OPTIMIZER)
    load(saved, verify=False)
    cut(saved / local.OPTIMIZER)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors has"):
        load(saved, verify=False)


def test_other_rows_than_the_markers_are_refused_even_unverified(saved: Path) -> None:
    flip_a_byte(saved / local.TABLE)
    with pytest.raises(CheckpointError, match="other memory rows"):
        load(saved, verify=False)


def test_damage_that_only_the_reader_meets_is_an_error_of_the_tree(saved: Path) -> None:
    for name in (local.MODEL, local.CONFIG):
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(b"\xff" * len(data))
        with pytest.raises(CheckpointError, match=name):
            load(saved, verify=False)
        (saved / name).write_bytes(data)


def test_a_large_file_is_checked_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PIECE_BYTES", 1000)
    save(build(WHOLE), tmp_path / "it")
    pieces = {file.name: len(file.sha256) for file in read_manifest(tmp_path / "it").files}
    assert pieces["model.safetensors"] == -(-(tmp_path / "it" / "model.safetensors").stat().st_size // 1000) > 9
    load(tmp_path / "it")
    flip_a_byte(tmp_path / "it" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was altered"):
        load(tmp_path / "it")


@pytest.mark.parametrize("number", [2, 0, "1", None])
def test_a_format_of_another_time_is_refused(number: object, saved: Path) -> None:
    data = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps(data | {"format": number}))
    with pytest.raises(CheckpointError, match=r"format .*reads format 1"):
        load(saved)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 1}', "\xff"])
def test_a_manifest_that_is_none_is_refused(text: str, saved: Path) -> None:
    (saved / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(saved)


def test_a_configuration_of_another_version_is_refused_by_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.loads((saved / local.CONFIG).read_text())
    text = json.dumps(data | {"dimm": data.pop("dim")}, indent=1)
    (saved / local.CONFIG).write_text(text)
    (saved / MANIFEST).unlink()
    manifest.write_manifest(saved, step=40, table_generations=(40,))
    with pytest.raises(CheckpointError, match=r"config\.json.*dimm"):
        load(saved)


# --- into a model that exists -----------------------------------------------------------------------------------------


def test_another_configuration_is_refused_before_anything_changes(saved: Path) -> None:
    other = build(replace(CANONICAL, dim=24, mtp=None), seed=3)
    before = {name: tensor.clone() for name, tensor in contents(other).items()}
    with pytest.raises(CheckpointError, match=r"model\.dim is 12 there, 24 here.*model\.mtp"):
        load_training(saved, other)
    assert same(contents(other), before)


def test_another_rule_for_rows_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state_NS is float32 \[\d+, 1\].*needs float32 \[\d+, 6\]"):
        load_training(saved, build(CANONICAL, state_dim=6))


def test_another_dtype_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is float32 .*needs bfloat16"):
        load_training(saved, build(CANONICAL).to(torch.bfloat16))


def test_weights_alone_are_not_resumed(tmp_path: Path) -> None:
    save(build(PLAIN), tmp_path / "it")
    with pytest.raises(CheckpointError, match="without training state"):
        load_training(tmp_path / "it", build(PLAIN))


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_run_means_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    models = {step: build(PLAIN, seed=step) for step in (9, 100, 1000)}
    for step, model in models.items():
        save(model, step_folder(tmp_path, step))
    assert step_folder(tmp_path, 100).name == "step-00000100"
    assert same(contents(load(tmp_path).model), contents(models[1000]))
    (step_folder(tmp_path, 1000) / MANIFEST).unlink()
    assert same(contents(load(tmp_path).model), contents(models[100]))
    cut(step_folder(tmp_path, 100) / local.MODEL)
    assert latest(tmp_path) == step_folder(tmp_path, 9)
    (step_folder(tmp_path, 9) / MANIFEST).write_text("{}")
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"without a complete checkpoint.*step-00001000"):
        load(tmp_path)


def test_the_newest_is_not_passed_over_because_this_version_cannot_read_it(tmp_path: Path) -> None:
    for step in (1, 2):
        save(build(PLAIN), step_folder(tmp_path, step))
    (step_folder(tmp_path, 2) / MANIFEST).write_text('{"format": 9}')
    with pytest.raises(CheckpointError, match="format 9"):
        load(tmp_path)


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nothing") is None


def test_pruning_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(build(PLAIN), step_folder(tmp_path, step))
    for step in (5, 3):
        (step_folder(tmp_path, step) / MANIFEST).unlink()
    (tmp_path / "checkpoints" / "notes").mkdir()
    prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["notes", "step-00000002", "step-00000004", "step-00000005"]
    prune(tmp_path, 0)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["notes", "step-00000004", "step-00000005"]
    assert latest(tmp_path) == step_folder(tmp_path, 4)
    (step_folder(tmp_path, 4) / MANIFEST).unlink()
    prune(tmp_path, 1)
    assert step_folder(tmp_path, 4).exists(), "without a complete one nothing is deleted"


def test_half_written_checkpoints_are_cleared_by_the_next_save(tmp_path: Path) -> None:
    save(build(PLAIN), step_folder(tmp_path, 1))
    shutil.copytree(step_folder(tmp_path, 1), tmp_path / "checkpoints" / f"{TEMPORARY}step-00000002-ab")
    assert latest(tmp_path) == step_folder(tmp_path, 1)
    save(build(PLAIN), step_folder(tmp_path, 3))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_that_stepped_aside_is_still_found(tmp_path: Path) -> None:
    model = build(PLAIN)
    target = step_folder(tmp_path, 7)
    save(model, target)
    aside = target.with_name(ASIDE + target.name)
    target.rename(aside)
    assert latest(tmp_path) == aside
    for path in (tmp_path, target):
        assert same(contents(load(path).model), contents(model))


def test_a_path_that_is_no_checkpoint_is_described(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(15):
        (tmp_path / "pictures" / f"{number:02}.png").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it holds 00\.png, .*11\.png and 3 more\. Give"):
        load(tmp_path / "pictures")
    with pytest.raises(CheckpointError, match=r"it is a file of 5 bytes"):
        load(tmp_path / "pictures" / "00.png")
    with pytest.raises(CheckpointError, match=r"does not exist; .* holds pictures"):
        load(tmp_path / "picture" / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="it is empty"):
        load(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"run without a complete checkpoint.*empty"):
        load(tmp_path / "run")


def test_only_checkpoints_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("…")
    (tmp_path / "file").write_text("…")
    with pytest.raises(CheckpointError, match=r"holds chapter\.tex"):
        save(build(PLAIN), tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="is a file"):
        save(build(PLAIN), tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be saved"):
        save(build(PLAIN), tmp_path / "file" / "below")
    assert snapshot(tmp_path) == {"thesis/chapter.tex": "…".encode(), "file": "…".encode()}
    (tmp_path / "empty").mkdir()
    save(build(PLAIN), tmp_path / "empty")
    load(tmp_path / "empty")


def test_weights_of_another_program_are_not_replaced_and_half_a_step_of_a_run_is(tmp_path: Path) -> None:
    for folder in (tmp_path / "hub", step_folder(tmp_path, 3)):
        folder.mkdir(parents=True)
        for name in (local.CONFIG, local.MODEL):
            (folder / name).write_bytes(b"of another program, or cut short")
    with pytest.raises(CheckpointError, match=r"holds config\.json, model\.safetensors"):
        save(build(PLAIN), tmp_path / "hub")
    save(build(PLAIN), step_folder(tmp_path, 3))
    assert latest(tmp_path) == step_folder(tmp_path, 3)


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path: Path) -> None:
    save(build(PLAIN), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    newer = build(PLAIN, seed=2)
    save(newer, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(contents(load(tmp_path / "real").model), contents(newer))


def test_only_a_model_of_byrote_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got Linear"):
        save(torch.nn.Linear(2, 2), tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused_by_name(saved: Path) -> None:
    with pytest.raises(ConfigError, match="tpu"):
        load(saved, device="tpu")


# --- failing disks ----------------------------------------------------------------------------------------------------


def failure_of(act: Callable[[], None]) -> ByroteError | None:
    try:
        act()
    except ByroteError as error:
        return error
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("replaces", [True, False], ids=["over the old one", "beside the old one"])
def test_whatever_call_fails_the_error_says_so_and_a_whole_checkpoint_stands(
    code: int, replaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = build(PLAIN, seed=1), build(PLAIN, seed=2)
    save(old, step_folder(tmp_path, 1))
    target = step_folder(tmp_path, 1 if replaces else 2)
    failures, left = 0, 0

    def faulty(call: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return wrapped

    for name in ("write", "fsync", "rename", "mkdir"):
        monkeypatch.setattr(os, name, faulty(getattr(os, name)))
    left = 1
    while (error := failure_of(lambda: save(new, target))) is not None:
        assert isinstance(error, CapacityError if code == errno.ENOSPC else CheckpointError)
        assert "is intact" in str(error) and (code == errno.EIO or "MiB" in str(error))
        failures += 1
        left = failures + 1
        stands = contents(load(tmp_path).model)
        assert same(stands, contents(old)) or same(stands, contents(new))
    assert failures > 20
    assert same(contents(load(tmp_path).model), contents(new))
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]


def test_a_disk_that_is_too_small_is_noticed_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build(PLAIN), step_folder(tmp_path, 1))
    before = snapshot(tmp_path)
    monkeypatch.setattr("byrote.device.disk_free", lambda path: 1000)
    with pytest.raises(CapacityError, match=r"step-00000002 needs .* of disk.*previous checkpoint .*step-00000001 is intact"):
        save(build(PLAIN), step_folder(tmp_path, 2))
    assert snapshot(tmp_path) == before and len(os.listdir(tmp_path / "checkpoints")) == 1


def test_a_tokenizer_that_cannot_be_written_leaves_the_old_checkpoint(saved: Path) -> None:
    class Full:
        def save(self, folder: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = snapshot(saved)
    with pytest.raises(CapacityError, match=r"the disk is full.*intact"):
        save(build(CANONICAL), saved, tokenizer=Full())
    assert snapshot(saved) == before


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_package_offers_its_names_and_imports_torch_only_for_them() -> None:
    code = """
import sys, byrote
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert set(byrote.__all__) <= set(dir(byrote))
byrote.errors.CheckpointError, byrote.__version__
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (byrote.save, byrote.load, byrote.Model, byrote.ModelConfig) == (save, load, Model, ModelConfig)


def test_an_unknown_name_of_the_package_is_an_attribute_error_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'modell'.*Model"):
        _ = byrote.modell


def test_the_version_is_that_of_the_package() -> None:
    assert byrote.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
