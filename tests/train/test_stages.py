"""Two-stage training of indexers: which stage a step is, that a warm-up moves indexers alone, and that stopping changes nothing."""

from dataclasses import replace

import pytest
import torch

from byrote.checkpoint.runs import latest
from byrote.config import from_dict, to_dict
from byrote.errors import ConfigError
from byrote.model.config import DSAConfig, MTPConfig
from byrote.model.dsa import DSA
from byrote.model.transformer import Model
from byrote.train import session
from byrote.train.loop import Trainer
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig
from byrote.train.stages import is_indexers, stage_at
from tests.model.tiny_models import ATTENTION, bare, whole
from tests.tolerances import assert_bitwise
from tests.train.test_loop import batch, contents
from tests.train.tiny_runs import files_of, tiny_run, write_corpus

SPARSE = DSAConfig(mla=ATTENTION, index_num_heads=4, index_head_dim=8, index_top_k=3)


def trainer(model_config=None, *, steps: int = 10, clip: float = 1.0, **train) -> Trainer:
    config = RunConfig(
        name="t",
        model=model_config or whole(attention=SPARSE, mtp=MTPConfig()),
        data=DataConfig(sources=(SourceConfig(path="x"),)),
        optim=OptimConfig(lr=0.01, adam_lr=0.01, warmup_fraction=0.0, clip_norm=clip),
        train=TrainConfig(steps=steps, precision="fp32", **train),
    )
    return Trainer(Model(config.model), config, steps)


def stages_of(made: Trainer) -> set[str]:
    return {module.stage for module in made.model.modules() if isinstance(module, DSA)}


def moved(made: Trainer, index: int) -> set[str]:
    """Names of all tensors that one step changes."""
    before = contents(made)
    made.step(index, [batch(seed=index)])
    return {name for name, tensor in contents(made).items() if name not in before or not torch.equal(tensor, before[name])}


def test_stages_follow_one_another_at_their_shares_of_the_run():
    assert [stage_at(step, 10, (0.3, 0.5), "sparse") for step in range(10)] == ["dense"] * 3 + ["dense_warmup"] * 2 + ["sparse"] * 5
    assert [stage_at(step, 4, (0.0, 0.5), "sparse") for step in range(4)] == ["dense_warmup"] * 2 + ["sparse"] * 2
    assert [stage_at(step, 4, (1.0, 1.0), "sparse") for step in range(4)] == ["dense"] * 4
    assert stage_at(3, 4, None, "dense_warmup") == "dense_warmup"


def test_a_step_of_each_stage_moves_what_it_should():
    made = trainer(index_warmup=(0.3, 0.6))
    parameters = {name for name, _ in made.model.named_parameters()}
    indexers = {name for name in parameters if is_indexers(name)}
    assert len(indexers) == 5 * 4  # of three blocks and MTP's
    made.step(0, [batch()])  # gains behind convolutions that begin at zero have no gradient yet
    dense = moved(made, 1)
    assert stages_of(made) == {"dense"} and dense & parameters == parameters - indexers
    assert {"rows", "visits"} <= dense and any(name.endswith(".bias") and "ffn" in name for name in dense)
    warm = moved(made, 3)
    assert stages_of(made) == {"dense_warmup"}
    assert {name.rpartition("/")[2] for name in warm} == indexers
    sparse = moved(made, 6)
    assert stages_of(made) == {"sparse"} and sparse & parameters == parameters
    assert {"rows", "visits"} <= sparse


def test_a_warm_up_by_configuration_moves_indexers_alone_and_they_learn():
    made = trainer(whole(attention=replace(SPARSE, index_stage="dense_warmup"), mtp=MTPConfig()), steps=40)
    before, losses = contents(made), []
    for index in range(40):
        losses.append(made.step(index, [batch(4, 20, seed=index % 3)]).losses)
    for name, tensor in contents(made).items():
        if not is_indexers(name):
            assert_bitwise(tensor, before[name])
    assert losses[-1]["indexer"] < 0.7 * losses[0]["indexer"]
    assert set(losses[0]) >= {"next_token", "mtp", "indexer"}


def test_after_a_warm_up_everything_learns_again():
    made = trainer(index_warmup=(0.0, 0.5))
    made.step(4, [batch()])
    assert not made.model.embed.weight.requires_grad
    made.step(5, [batch()])
    assert all(parameter.requires_grad for parameter in made.model.parameters())


def test_the_indexers_gradient_does_not_shorten_the_step_of_the_rest():
    """Clipping by a joint norm would: indexers a hundred times as loud leave the other parameters' step as it was."""
    models = []
    for loud in (1.0, 100.0):
        made = trainer(bare(attention=SPARSE), clip=0.01)
        for attention in (module for module in made.model.modules() if isinstance(module, DSA)):
            attention.loss = lambda *args, loss=attention.loss, loud=loud: loud * loss(*args)
        made.step(0, [batch()])
        models.append(dict(made.model.named_parameters()))
    for name, parameter in models[0].items():
        if not is_indexers(name):
            assert_bitwise(parameter.detach(), models[1][name].detach())


def test_a_run_stopped_in_the_warm_up_and_resumed_is_the_run_that_never_stopped(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    config = tiny_run(corpus, save_every=4, index_warmup=(0.25, 0.75))
    config = replace(config, model=replace(config.model, attention=SPARSE))
    whole_run, _ = session.train(config, tmp_path / "whole")

    def stop(done: int, run: session.Run) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.train(config, tmp_path / "parts", hooks=[stop])
    resumed, _ = session.train(config, tmp_path / "parts", resume=True)
    assert resumed.done == whole_run.done == 8
    folders = [latest(tmp_path / name) for name in ("whole", "parts")]
    assert files_of(folders[0]) == files_of(folders[1])


def test_the_schedule_survives_a_dictionary_and_impossible_ones_are_refused():
    config = TrainConfig(index_warmup=(0.1, 0.2))
    assert from_dict(TrainConfig, to_dict(config)) == config
    for shares in ((0.5, 0.2), (-0.1, 0.2), (0.5, 1.1)):
        with pytest.raises(ConfigError, match="two shares of the run"):
            TrainConfig(index_warmup=shares)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (bare(), "no block has an indexer"),
        (bare(attention=replace(SPARSE, index_stage="dense_warmup")), "some block's index_stage is dense_warmup"),
    ],
)
def test_a_schedule_for_a_model_that_cannot_have_it_is_refused(config, named):
    with pytest.raises(ConfigError, match=named):
        trainer(config, index_warmup=(0.1, 0.2))


def test_blocks_in_different_stages_are_refused():
    mixed = (SPARSE, replace(SPARSE, index_stage="dense_warmup"), SPARSE)
    with pytest.raises(ConfigError, match="give all the same"):
        trainer(bare(attention=mixed))
