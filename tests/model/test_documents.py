"""Documents packed into one row live as if each were alone: logits, losses, gradients, rows of memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from byrote.model.config import MTPConfig
from byrote.model.documents import document_positions, document_runs
from byrote.model.mtp import shift_targets
from byrote.model.transformer import Model, Output
from tests.model.tiny_models import ENGRAM, RESIDUALS, assert_same_gradients, bare, build, gradients, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

LENGTHS = (5, 1, 11, 2, 8)
MODELS = {
    "whole": whole(),
    "hc": whole(residual=RESIDUALS["hc"]),
    "bare": bare(),
    "hard gate": whole(engram=replace(ENGRAM, gate="hard")),
}


def packed() -> tuple[list[Tensor], Tensor, Tensor]:
    """(documents, the row that holds them all, document numbers); numbers are in no order, and one returns."""
    documents = [text(1, length, seed=length) for length in LENGTHS]
    numbers = torch.tensor([7, 3, 12, 0, 7])
    return documents, torch.cat(documents, dim=1), torch.repeat_interleave(numbers, torch.tensor(LENGTHS))[None]


def with_losses(model: Model, tokens_BT: Tensor, document_BT: Tensor | None = None) -> Output:
    targets_BT = next_tokens(tokens_BT, document_BT)
    want = ("token_losses", "mtp_losses") if model.mtp else ("token_losses",)
    return model(tokens_BT, document_BT=document_BT, targets_BT=targets_BT, want=want)


def summed_loss(out: Output, tokens_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
    """Sum, not mean, over the scored tokens, of the next-token loss and of MTP at depth 1."""
    targets_BT = next_tokens(tokens_BT, document_BT)
    total = out.losses["next_token"] * (targets_BT != -100).sum()
    if "mtp" in out.losses:
        total = total + out.losses["mtp"] * (shift_targets(targets_BT, document_BT, 1) != -100).sum()
    return total


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_have_the_logits_and_losses_of_each_alone(name):
    model = build(MODELS[name])
    documents, row, document_BT = packed()
    with torch.no_grad():
        assert_close_fp32(model(row, document_BT=document_BT).logits, torch.cat([model(one).logits for one in documents], dim=1))
        together, alone = with_losses(model, row, document_BT), [with_losses(model, one) for one in documents]
    assert_close_fp32(together.extras["token_losses"], torch.cat([out.extras["token_losses"] for out in alone], dim=1))
    for depth in range(len(model.mtp)):
        assert_close_fp32(together.extras["mtp_losses"][depth], torch.cat([out.extras["mtp_losses"][depth] for out in alone], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_have_the_gradients_of_each_alone(name, dtype):
    config = MODELS[name] if MODELS[name].mtp is None else replace(MODELS[name], mtp=MTPConfig())
    together, alone = build(config).to(dtype), build(config).to(dtype)
    documents, row, document_BT = packed()
    whole_out = with_losses(together, row, document_BT)
    summed_loss(whole_out, row, document_BT).backward()
    parts = [with_losses(alone, one) for one in documents]
    for out, one in zip(parts, documents, strict=True):
        summed_loss(out, one).backward()
    assert_same_gradients(together, alone)
    if together.memory is not None:
        wanted_NE = torch.zeros_like(together.memory.store.vectors_NE)
        for out in parts:
            wanted_NE.index_add_(0, out.rows.rows_U, out.rows.vectors_UE.grad)
        assert_close_fp32(whole_out.rows.vectors_UE.grad, wanted_NE[whole_out.rows.rows_U])


@pytest.mark.parametrize("name", ["whole", "bare"])
def test_padding_on_either_side_changes_no_loss_and_no_gradient(name):
    one = text(1, 9)
    row = torch.cat((text(1, 3, seed=1), one, text(1, 4, seed=2)), dim=1)
    document_BT = torch.tensor([[-1] * 3 + [0] * 9 + [-1] * 4])
    padded, alone = build(MODELS[name]), build(MODELS[name])
    with_losses(padded, row, document_BT).losses["next_token"].backward()
    with_losses(alone, one).losses["next_token"].backward()
    assert_same_gradients(padded, alone)


def test_a_row_of_padding_alone_is_finite_and_changes_nothing():
    one, document_BT = text(1, 9), torch.tensor([[0] * 9, [-1] * 9])
    both, alone = build(whole()).train(), build(whole()).train()
    out = with_losses(both, torch.cat((one, text(1, 9, seed=1))), document_BT)
    twin = with_losses(alone, one)
    assert_close_fp32(out.losses["next_token"], twin.losses["next_token"])
    sum(out.losses.values()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(both).values())
    for name, load_E in twin.loads.items():
        assert_bitwise(out.loads[name], load_E)


def test_positions_restart_with_every_document():
    document_BT = torch.tensor([[-1, -1, 4, 4, 4, 7], [3, 3, 3, 3, 3, 3], [0, 1, 0, 1, 1, 1]])
    assert document_positions(document_BT).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]]
    assert document_positions(document_BT[:, :0]).shape == (3, 0)


def test_a_number_that_returns_is_another_document():
    numbers = torch.tensor([[-1, -1, 4, 4, 4, 7, 4]])
    assert document_runs(numbers).tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    parts = [document_runs(numbers[:, :3]), document_runs(numbers[:, 3:], numbers[:, 2:3], torch.tensor([[1]]))]
    assert torch.cat(parts, dim=1).tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    assert document_runs(numbers[:, :0]).shape == (1, 0)


def test_documents_in_one_batch_row_do_not_depend_on_their_neighbours_order():
    model = build(whole())
    first, second = text(1, 6), text(1, 9, seed=1)
    numbers = torch.tensor([[0] * 6 + [1] * 9])
    with torch.no_grad():
        ahead = model(torch.cat((first, second), dim=1), document_BT=numbers).logits
        behind = model(torch.cat((second, first), dim=1), document_BT=1 - numbers.flip(1)).logits
    assert_close_fp32(ahead[:, :6], behind[:, 9:])
    assert_close_fp32(ahead[:, 6:], behind[:, :9])


def test_given_positions_replace_the_counted_ones():
    model, tokens_BT = build(bare()), text(1, 7)
    counted = torch.arange(7)[None]
    with torch.no_grad():
        plain = model(tokens_BT).logits
        assert_bitwise(model(tokens_BT, position_BT=counted).logits, plain)
        assert_close_fp32(model(tokens_BT, position_BT=counted + 100).logits, plain)  # rotary positions are relative
        assert (model(tokens_BT, position_BT=counted * 2).logits - plain).abs().max() > 1e-3
