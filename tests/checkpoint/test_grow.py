"""A dense model's weights begin a sparse one, which computes the same until it is told to choose."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from byrote.checkpoint.local import load_weights, save
from byrote.errors import CheckpointError
from byrote.model.config import DSAConfig
from byrote.model.transformer import Model
from byrote.train import session
from tests.model.tiny_models import ATTENTION, build, text, whole
from tests.tolerances import assert_bitwise
from tests.train.tiny_runs import tiny_run, write_corpus

SPARSE = DSAConfig(mla=ATTENTION, index_num_heads=4, index_head_dim=8, index_top_k=5)
plain = partial(whole, engram=None)  # the last test brings memory along


def test_a_sparse_model_begins_as_the_dense_one_with_indexers_as_its_seed_drew_them(tmp_path: Path) -> None:
    dense = build(plain())
    save(dense, tmp_path / "dense")
    sparse = Model(plain(attention=SPARSE), seed=7).eval()
    fresh = {name: tensor.clone() for name, tensor in sparse.state_dict().items() if ".indexer." in name}
    load_weights(tmp_path / "dense", sparse)
    for name, tensor in fresh.items():
        assert_bitwise(sparse.state_dict()[name], tensor)
    with torch.no_grad():
        for block in sparse.blocks:
            block.attn.stage = "dense"
        assert_bitwise(sparse(text(2, 23)).logits, dense(text(2, 23)).logits)


def test_a_sparse_models_own_weights_keep_their_indexers(tmp_path: Path) -> None:
    one, other = build(plain(attention=SPARSE)), Model(plain(attention=SPARSE), seed=7).eval()
    save(one, tmp_path / "one")
    load_weights(tmp_path / "one", other)
    for name, tensor in one.state_dict().items():
        assert_bitwise(other.state_dict()[name], tensor)


def test_a_dense_model_does_not_begin_as_a_sparse_one_nor_one_of_other_sizes(tmp_path: Path) -> None:
    save(build(plain(attention=SPARSE)), tmp_path / "sparse")
    save(build(plain()), tmp_path / "dense")
    wide = replace(SPARSE, mla=replace(ATTENTION, kv_lora_rank=12))
    for folder, config in (("sparse", plain()), ("dense", plain(attention=wide))):
        with pytest.raises(CheckpointError, match="attn"):
            load_weights(tmp_path / folder, Model(config))


def test_a_run_may_start_from_a_dense_run_and_warm_its_indexers_up(tmp_path: Path) -> None:
    dense = tiny_run(write_corpus(tmp_path / "corpus"), steps=2)
    session.train(dense, tmp_path / "dense")
    train = replace(dense.train, steps=4, start_from=str(tmp_path / "dense"), index_warmup=(0.0, 1.0))
    sparse = replace(dense, model=replace(dense.model, attention=SPARSE), train=train)
    begun, _ = session.train(dense, tmp_path / "dense", resume=True)
    grown, summary = session.train(sparse, tmp_path / "sparse")
    assert summary.steps == 4
    want = {name.replace(".attn.", ".attn.mla."): tensor for name, tensor in begun.model.state_dict().items() if name != "_extra_state"}
    for name, tensor in want.items():
        assert_bitwise(grown.model.state_dict()[name], tensor)
