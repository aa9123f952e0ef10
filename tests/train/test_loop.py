"""One optimizer step: what it changes, what it counts, and that it changes nothing when a number is not finite."""

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from byrote.errors import TrainingError
from byrote.model.config import MTPConfig
from byrote.model.transformer import Model
from byrote.optim.rowwise import state_dim
from byrote.train.loop import Trainer, scored_shares
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig
from tests.model.tiny_models import ENGRAM, MOE, bare, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

PLAIN_SGD = OptimConfig(clip_norm=0.0, warmup_fraction=0.0)


class Texts(NamedTuple):
    tokens_BT: Tensor
    targets_BT: Tensor
    document_BT: Tensor | None = None


def batch(rows: int = 2, length: int = 9, *, seed: int = 0, scored: int | None = None) -> Texts:
    tokens_BT = text(rows, length, seed=seed)
    targets_BT = next_tokens(tokens_BT)
    if scored is not None:
        targets_BT[:, scored:] = -100
    return Texts(tokens_BT, targets_BT)


def trainer(model_config=None, *, optim: OptimConfig | None = None, precision: str = "fp32", steps: int = 100) -> Trainer:
    config = RunConfig(
        name="t",
        model=model_config or whole(mtp=MTPConfig()),
        data=DataConfig(sources=(SourceConfig(path="x"),)),
        optim=optim or OptimConfig(lr=0.01, adam_lr=0.01, warmup_fraction=0.0),
        train=TrainConfig(steps=steps, precision=precision),
    )
    engram = config.model.engram
    table_state = 1 if engram is None else state_dim(config.optim.table_rule, engram.head_dim)
    return Trainer(Model(config.model, table_state_dim=table_state), config, steps)


def contents(made: Trainer) -> dict[str, Tensor]:
    """Every number that a step may change."""
    store = made.model.memory.store
    table = {"rows": store.vectors_NE, "row state": store.state_NS, "visits": store.visits_N}
    found = {**made.model.state_dict(), **made.optimizers.state_dict().tensors, **table}
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("rule", ["rowwise", "adam"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_rows_that_were_read_change(rule, dtype):
    made = trainer(whole(engram=replace(ENGRAM, table_dtype=dtype)), optim=OptimConfig(table_rule=rule, adam_lr=0.05))
    store, before = made.model.memory.store, made.model.memory.store.vectors_NE.clone()
    read = made.model.memory.fetch(batch().tokens_BT).rows_U
    result = made.step(0, [batch()])
    others = torch.ones(store.num_rows, dtype=torch.bool)
    others[read] = False
    assert result.rows_touched == len(read)
    assert_bitwise(store.vectors_NE[others], before[others])
    assert (store.vectors_NE[read] != before[read]).any(1).float().mean() > 0.9
    assert_bitwise(store.visits_N, (~others).int())
    assert not store.state_NS[others].any()


def test_the_same_batch_twice_running_reads_what_the_first_step_wrote():
    made = trainer()
    made.step(0, [batch()])
    after_one = copy.deepcopy(made.model).train()
    expected = after_one(batch().tokens_BT, targets_BT=batch().targets_BT).losses
    again = made.step(1, [batch()])
    for term, loss in expected.items():
        assert_bitwise(again.losses[term], loss.detach())
    assert (made.model.memory.store.visits_N[made.model.memory.fetch(batch().tokens_BT).rows_U] == 2).all()


@pytest.mark.parametrize("matrix", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tiny_model_learns_two_texts_by_heart(matrix, precision):
    optim = OptimConfig(matrix=matrix, lr=0.02, adam_lr=0.01, warmup_fraction=0.1)
    made = trainer(whole(mtp=MTPConfig(), init_std=0.05), optim=optim, precision=precision, steps=40)
    losses = [made.step(index, [batch(2, 16)]).losses for index in range(40)]
    assert losses[-1]["next_token"] < losses[0]["next_token"] / 2
    assert losses[-1]["mtp"] < losses[0]["mtp"]


def merged(*parts: Texts) -> Texts:
    return Texts(*(torch.cat([part[field] for part in parts]) for field in (0, 1)))


def seen_gradients(made: Trainer, batches: list[Texts]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients, results) of one step, as the optimizers got them."""
    kept = {}
    step = made.optimizers.step
    made.optimizers.step = lambda: (
        kept.update({n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}),
        step(),
    )
    if made.rows is not None:
        row_step = made.rows.step
        made.rows.step = lambda rows_U, grad_UE, slab: (kept.update(rows=rows_U, row_gradient=grad_UE.clone()), row_step(rows_U, grad_UE))
    result = made.step(0, batches)
    return kept, {"norm": result.grad_norm, **result.losses}


# the balance loss is made of means over experts that are chosen in the whole sequence, so it does not depend on how sequences are cut
@pytest.mark.parametrize("scored", [None, 3], ids=["as many scored tokens", "fewer in one"])
def test_micro_batches_train_like_one_big_batch(scored):
    parts = [batch(2, seed=0), batch(2, seed=1, scored=scored), batch(2, seed=2)]
    config = whole(mtp=None, moe=replace(MOE, balance_alpha=0.0)) if scored else whole(mtp=MTPConfig())
    (small, small_numbers), (big, big_numbers) = (
        seen_gradients(trainer(config, optim=PLAIN_SGD), some) for some in (parts, [merged(*parts)])
    )
    assert_bitwise(small.pop("rows"), big.pop("rows"))
    assert_close_fp32(small["row_gradient"], big["row_gradient"])
    assert small.keys() == big.keys()
    assert_close_fp32(*(torch.cat([gradient.flatten() for gradient in some.values()]) for some in (small, big)))
    for name, number in big_numbers.items():
        assert_close_fp32(small_numbers[name], number)


def test_loads_of_micro_batches_are_summed_before_the_bias_moves():
    made, twin = trainer(), trainer()
    parts = [batch(2, seed=seed) for seed in range(3)]
    result, whole_result = made.step(0, parts), twin.step(0, [merged(*parts)])
    for name, load in whole_result.loads.items():
        assert_bitwise(result.loads[name], load)
        assert_bitwise(made.model.get_submodule(name).bias, twin.model.get_submodule(name).bias)
        assert set(made.model.get_submodule(name).bias.abs().unique().tolist()) <= {0.0, torch.tensor(0.001).item()}


def test_shares_follow_the_scored_tokens():
    assert scored_shares([batch(2, 9, scored=3), batch(1, 7)]) == [0.5, 0.5]
    assert scored_shares([batch(2, 9, scored=0), batch(1, 7)]) == [0.0, 1.0]
    assert scored_shares([batch(scored=0)] * 4) == [0.25] * 4


def test_the_clipping_norm_covers_parameters_and_rows():
    free, numbers = seen_gradients(trainer(optim=PLAIN_SGD), [batch()])
    del free["rows"]
    norm = torch.cat([gradient.flatten() for gradient in free.values()]).norm()
    assert_close_fp32(numbers["norm"], norm)
    clipped, _ = seen_gradients(trainer(optim=replace(PLAIN_SGD, clip_norm=norm.item() / 4)), [batch()])
    for name, gradient in free.items():
        assert_close_fp32(clipped[name], gradient / 4)


def test_a_batch_without_a_scored_token_is_no_trouble():
    made = trainer()
    result = made.step(0, [batch(scored=0)])
    assert result.losses["next_token"] == 0 and result.grad_norm.isfinite()


def test_rates_and_the_weight_of_mtp_follow_the_schedule():
    made = trainer(optim=OptimConfig(lr=0.01, adam_lr=0.02, warmup_fraction=0.2, decay_fraction=0.5), steps=10)
    results = [made.step(index, [batch()]) for index in range(10)]
    assert [result.lr_scale for result in results] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [result.mtp_weight for result in results] == [0.3] * 5 + [0.1] * 5
    assert made.rows.lr == pytest.approx(0.02 * 5 * 0.2)


def nan_in_a_parameter(made: Trainer) -> None:
    made.model.blocks[1].attn.kv_a.weight.data[0, 0] = torch.nan


def nan_in_a_row(made: Trainer) -> None:
    made.model.memory.store.vectors_NE[made.model.memory.fetch(batch().tokens_BT).rows_U[3]] = torch.nan


def nan_in_a_gradient(made: Trainer) -> None:
    made.model.blocks[0].ffn.down.weight.register_hook(lambda gradient: gradient * torch.nan)


def infinite_loss_with_finite_gradients(made: Trainer) -> None:
    forward = made.model.forward

    def raised(*args, **kwargs):
        out = forward(*args, **kwargs)
        return out._replace(losses=out.losses | {"next_token": out.losses["next_token"] + torch.inf})

    made.model.forward = raised


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (nan_in_a_parameter, r"the parameter blocks\.1\.attn\.kv_a\.weight is not finite"),
        (nan_in_a_row, r"the memory row \d+ is"),
        (nan_in_a_gradient, r"the gradient of blocks\.0\.ffn\.down\.weight is"),
        (infinite_loss_with_finite_gradients, "the loss term 'next_token' is"),
    ],
)
def test_what_is_not_finite_is_named_and_nothing_changes(spoil, named):
    made = trainer()
    made.step(0, [batch(seed=5)])
    spoil(made)
    before = contents(made)
    with pytest.raises(TrainingError, match=rf"step 1: {named}"):
        made.step(1, [batch()])
    after = contents(made)
    for name, tensor in before.items():
        assert_bitwise(after[name], tensor)
    assert all(param.grad is None for param in made.model.parameters()), "no gradient is left for the next step"


def test_a_model_of_attention_alone_trains_too():
    made = trainer(bare())
    result = made.step(0, [batch()])
    assert result.loads == {} and result.rows_touched == 0 and list(result.losses) == ["next_token"]
