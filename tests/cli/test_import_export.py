"""`byrote export` and `byrote import`: a run goes out, comes back, and computes the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import byrote
from byrote.cli.main import main
from byrote.model.config import MLAConfig, ModelConfig, MoEConfig, MTPConfig, ResidualConfig
from byrote.tokenizer.bpe import Tokenizer, train_bpe
from tests.tolerances import assert_bitwise

CONFIG = ModelConfig(
    vocab_size=261,
    dim=12,
    num_layers=2,
    attention=MLAConfig(num_heads=2, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=3),
    ffn_hidden=9,
    moe=MoEConfig(num_experts=4, top_k=2, expert_hidden=5),
    residual=ResidualConfig(kind="plain"),
    mtp=MTPConfig(),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["so it goes. so it goes."] * 2, 261)


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    byrote.save(byrote.Model(CONFIG), tmp_path / "run", tokenizer=tokenizer)
    return tmp_path / "run"


def test_out_and_in_again_is_the_same_model_and_tokenizer(
    run: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    assert "2 layers and 1 of MTP" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert "261 tokens" in capsys.readouterr().out
    want, _ = byrote.load(run)
    model, got_tokenizer = byrote.load(tmp_path / "back")
    assert model.config == CONFIG
    for name, tensor in want.state_dict().items():
        assert_bitwise(model.state_dict()[name], tensor)
    assert got_tokenizer.fingerprint() == tokenizer.fingerprint()


def test_dry_runs_print_and_write_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(run), str(tmp_path / "hf"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["dry_run"], plan["config"]["num_nextn_predict_layers"]) == (True, 1)
    assert not (tmp_path / "hf").exists()
    assert main(["export", str(run), str(tmp_path / "hf"), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done == plan | {"dry_run": False}
    assert set(done["files"]) == {path.name for path in (tmp_path / "hf").iterdir()}
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(parameter.numel() for parameter in byrote.Model(CONFIG).parameters())
    assert (found["mtp_depth"], found["tokenizer"], found["dtypes"], found["notes"]) == (1, 261, ["F32"], [])
    assert not (tmp_path / "back").exists()


def test_small_shards_can_be_asked_for(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "hf"), "--shard-gb", "0.00001"]) == 0
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert main(["export", str(run), str(tmp_path / "other"), "--shard-gb", "0"]) == 2


def test_weights_alone_can_be_imported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["export", str(run), str(tmp_path / "hf")])
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 2
    assert "--without-tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back"), "--without-tokenizer"]) == 0
    assert "no tokenizer comes along" in capsys.readouterr().out
    assert byrote.load(tmp_path / "back").tokenizer is None


def test_an_import_that_would_not_fit_on_the_disk_ends_before_it_reads(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["export", str(run), str(tmp_path / "hf")])
    monkeypatch.setattr("byrote.device.disk_free", lambda path: 100)
    monkeypatch.setattr("byrote.checkpoint.huggingface.import_hf", lambda *args, **kwargs: pytest.fail("read"))
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 2
    assert "free some space" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_what_v3_cannot_express_ends_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    byrote.save(byrote.Model(replace(CONFIG, residual=ResidualConfig())), tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "residual.kind is 'mhc'" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(run), str(run)]) == 2
    assert main(["export", str(run), str(run), "--overwrite"]) == 2  # a byrote checkpoint is no export
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), str(run)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert torch.equal(byrote.load(run).model.embed.weight, byrote.Model(CONFIG).embed.weight)
    assert main(["export", str(run), str(tmp_path / "hf"), "--overwrite"]) == 0
