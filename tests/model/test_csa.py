"""V4's attention against itself: documents alone and packed, caches in any cuts, all entries and the chosen ones, gradients, memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels.sparse_index import Chosen
from byrote.model import csa
from byrote.model.config import DSAConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig, V4AttentionConfig, YarnConfig
from byrote.model.transformer import Model
from tests.model.tiny_models import ATTENTION, VOCAB, assert_same_gradients, bare, build, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

LENGTH = 267
V4 = V4AttentionConfig(
    num_heads=6,
    head_dim=10,
    rope_head_dim=6,
    q_lora_rank=7,
    o_groups=3,
    o_lora_rank=5,
    sliding_window=9,
    compress_ratios=(0, 4, 128, 4),
    index_num_heads=16,
    index_head_dim=8,
    index_top_k=11,
    compress_rope=RopeConfig(theta=500.0, yarn=YarnConfig(factor=16.0, original_positions=64)),
)
MOE = MoEConfig(num_experts=5, top_k=2, expert_hidden=8, score="sqrt_softplus", num_dense_layers=0, num_hash_layers=1)


def v4_config(**changes: object) -> ModelConfig:
    """Window with hash routing, CSA, HCA, CSA; no memory, one MTP module."""
    parts = {"num_layers": 4, "attention": V4, "moe": MOE, "engram": None, "mtp": MTPConfig(form="streams"), "swiglu_limit": 10.0}
    return whole(**(parts | changes))


def alone(ratio: int, **changes: object) -> ModelConfig:
    return bare(num_layers=1, attention=replace(V4, compress_ratios=(ratio,), **changes))


@pytest.fixture(scope="module")
def model() -> Model:
    return build(v4_config())


def read(model: Model, tokens_BT: Tensor, cuts: tuple[int, ...], **state: object) -> Tensor:
    memory, pieces = model.new_state(len(tokens_BT), **state), tokens_BT.tensor_split(cuts, dim=1)
    with torch.no_grad():
        return torch.cat([model(piece, state=memory).logits for piece in pieces], dim=1)


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4, 130, 131), (127, 128, 129, 260), tuple(range(5, LENGTH, 7))])
def test_cached_in_any_pieces_equals_at_once(model: Model, cuts: tuple[int, ...]) -> None:
    tokens_BT = text(2, LENGTH)
    with torch.no_grad():
        assert_close_fp32(read(model, tokens_BT, cuts), model(tokens_BT).logits)


def test_token_by_token_equals_at_once(model: Model) -> None:
    tokens_BT = text(1, 140)
    with torch.no_grad():
        assert_close_fp32(read(model, tokens_BT, tuple(range(1, 140))), model(tokens_BT).logits)


def test_packed_and_padded_documents_are_read_as_if_alone(model: Model) -> None:
    lengths, documents = (131, 5, 1, 270), []
    tokens_BT = text(1, sum(lengths))
    for number, length in enumerate(lengths):
        documents += [number] * length
    document_BT = torch.tensor([documents])
    padded_BT = torch.cat((torch.zeros(1, 6, dtype=torch.int64), tokens_BT), dim=1)
    padding_BT = torch.cat((torch.full((1, 6), -1), document_BT), dim=1)
    with torch.no_grad():
        packed = model(tokens_BT, document_BT=document_BT).logits
        alone = torch.cat([model(piece).logits for piece in tokens_BT.split(lengths, dim=1)], dim=1)
        assert_close_fp32(packed, alone)
        padded = model(padded_BT, document_BT=padding_BT).logits
    assert_close_fp32(padded[:, 6:], alone)


def test_rows_padded_differently_are_cached_as_if_alone(model: Model) -> None:
    lengths, longest = (200, 131, 7), 200
    tokens_BT, document_BT = torch.zeros(3, longest, dtype=torch.int64), torch.full((3, longest), -1)
    alone = []
    for row, length in enumerate(lengths):
        own = text(1, length, seed=row)
        tokens_BT[row, longest - length :], document_BT[row, longest - length :] = own[0], 0
        with torch.no_grad():
            alone.append(model(torch.cat((own, text(1, 9, seed=9)), dim=1)).logits)
    state, more = model.new_state(3), text(1, 9, seed=9).expand(3, -1)
    with torch.no_grad():
        got = [
            model(piece, document_BT=part, state=state).logits
            for piece, part in zip(*(x.split(67, 1) for x in (tokens_BT, document_BT)), strict=True)
        ]
        got += [model(more[:, :1], state=state).logits, model(more[:, 1:], state=state).logits]
    got_BTV = torch.cat(got, dim=1)
    for row, want in enumerate(alone):
        assert_close_fp32(got_BTV[row : row + 1, longest - lengths[row] :], want)


@pytest.mark.parametrize("length", [9, 125, 131, 132, 134])
def test_rolled_back_is_as_if_never_read(model: Model, length: int) -> None:
    tokens_BT, state = text(2, 160), model.new_state(2, max_rollback=8)
    with torch.no_grad():
        model(tokens_BT[:, :length], state=state)
        for cut in (1, 3, 4):
            model(text(2, cut, seed=cut), state=state)
            state.rollback(cut)
        state.rollback(3)
        got = model(tokens_BT[:, length - 3 :], state=state).logits
        assert_close_fp32(got, model(tokens_BT).logits[:, length - 3 :])


def test_snapshots_and_selected_rows_go_on_as_they_were(model: Model) -> None:
    tokens_BT, state = text(3, 150), model.new_state(3)
    with torch.no_grad():
        model(tokens_BT[:, :130], state=state)
        snapshot = state.snapshot()
        model(text(3, 9, seed=5), state=state)
        state.restore(snapshot)
        state.select(torch.tensor([2, 0, 2]))
        got = model(tokens_BT[[2, 0, 2], 130:], state=state).logits
        assert_close_fp32(got, model(tokens_BT).logits[[2, 0, 2], 130:])


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_no_logit_depends_on_later_tokens(ratio: int) -> None:
    model, tokens_BT = build(alone(ratio)), text(1, LENGTH)
    changed = tokens_BT.clone()
    changed[0, 131] = (changed[0, 131] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens_BT).logits, model(changed).logits
    assert_close_fp32(after[:, :131], before[:, :131])
    assert (after[:, 131:] - before[:, 131:]).abs().max() > 1e-3


@pytest.mark.parametrize(("ratio", "far"), [(0, 8), (4, 140), (128, 127)])
def test_a_token_reaches_as_far_as_window_and_entries_go(ratio: int, far: int) -> None:
    """Token 0 of one block changes logits of the window, and where there are entries of everything after its group closed."""
    model, tokens_BT = build(alone(ratio, index_top_k=999)), text(1, 141)
    changed = tokens_BT.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB
    with torch.no_grad():
        moved_T = (model(changed).logits - model(tokens_BT).logits).abs().amax((0, 2)) > 1e-7
    reached = {0: range(9), 4: range(141), 128: [*range(9), *range(127, 141)]}[ratio]
    assert moved_T.nonzero().flatten().tolist() == list(reached)
    assert moved_T[far]


def test_choosing_as_many_as_there_are_equals_reading_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_BT = text(2, 87)
    dense, sparse = (build(alone(4, index_top_k=k)) for k in (21, 20))
    seen = []
    monkeypatch.setattr(csa, "select", lambda *parts: seen.append(parts[3].end_BT) or Chosen.everything(parts[3], 21))
    with torch.no_grad():
        assert_close_fp32(sparse(tokens_BT).logits, dense(tokens_BT).logits)
    assert len(seen) == 1 and int(seen[0].max()) == 21


def test_blocks_of_queries_give_what_all_at_once_do(monkeypatch: pytest.MonkeyPatch) -> None:
    models, tokens_BT = [], text(2, 87)
    for listed in (1 << 22, 2 * 21 * 10):
        monkeypatch.setattr(csa, "_LISTED", listed)
        models.append(build(alone(4, index_stage="dense_warmup")).double())
        models[-1](tokens_BT).logits.square().sum().backward()
    assert_same_gradients(*models)
    assert_close_fp32(models[1](tokens_BT).logits, models[0](tokens_BT).logits)


def test_what_is_read_of_many_entries_may_be_copied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_BT = build(alone(4)), text(2, 97)
    with torch.no_grad():
        want = read(model, tokens_BT, (95, 96))
        monkeypatch.setattr(csa, "_narrowed", lambda entries_BEK, chosen: (entries_BEK, chosen))
        assert_bitwise(read(model, tokens_BT, (95, 96)), want)


def test_groups_close_where_their_documents_say() -> None:
    number_BT = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [3] * 8 + [5] * 4])
    batches: list[csa.Batch] = []
    model = build(alone(4))
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: batches.append(args[1]))
    model(text(2, 12), document_BT=number_BT)
    groups = csa.find_groups(batches[0], model.blocks[0].attn.config)
    assert groups.last_BE.tolist() == [[5, 10, -1], [3, 7, 11]]
    assert groups.opens_BE[:, :2].tolist() == [[True, True], [True, False]] and groups.opens_BE[1, 2]
    spans = [list(zip(*(edge.tolist() for edge in row), strict=True)) for row in zip(*groups.spans, strict=True)]
    assert [end - first for first, end in spans[0]] == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    assert spans[0][10] == (1, 2) and spans[1][7] == (0, 2) and spans[1][8] == (2, 2) and spans[1][11] == (2, 3)


# --- learning ----------------------------------------------------------------------------------------------------------


def indexed(model: Model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


def test_the_language_model_loss_never_reaches_the_indexer_nor_its_loss_anything_else() -> None:
    model, tokens_BT = build(v4_config()).train(), text(2, LENGTH)
    losses = model(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses
    assert losses["indexer"] > 0
    losses["indexer"].backward(retain_graph=True)
    learnt = indexed(model)
    assert learnt == {name for name, _ in model.named_parameters() if ".indexer." in name}
    model.zero_grad()
    (losses["next_token"] + losses["mtp"]).backward()
    assert not any(".indexer." in name for name in indexed(model))


def test_the_indexer_learns_what_attention_reads() -> None:
    model, tokens_BT = build(alone(4, index_top_k=99)).train(), text(1, 43)
    mine = [parameter for name, parameter in model.named_parameters() if ".indexer." in name]
    optimizer, seen = torch.optim.Adam(mine, lr=0.03), []
    for _ in range(20):
        loss = model(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses["indexer"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_in_dense_warm_up_every_entry_is_read_and_the_indexer_still_learns() -> None:
    tokens_BT = text(2, 87)
    dense, warm = build(alone(4, index_top_k=99)), build(alone(4, index_stage="dense_warmup"))
    with torch.no_grad():
        assert_bitwise(warm(tokens_BT).logits, dense(tokens_BT).logits)
    losses = warm.train()(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses
    assert losses["indexer"] > 0


def test_gradients_are_those_of_finite_differences() -> None:
    """In fp64 and through a whole model: compressors, sinks, grouped output, read-out, along a random direction of all parameters."""
    model, tokens_BT = build(v4_config(mtp=None, attention=replace(V4, index_top_k=999))).double(), text(1, 140)
    cotangent_BTV = torch.randn(1, 140, VOCAB, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    moved = {
        name: torch.randn(part.shape, generator=generator).double() for name, part in model.named_parameters() if ".indexer." not in name
    }

    def value() -> Tensor:
        return (model(tokens_BT).logits * cotangent_BTV).sum()

    value().backward()
    slope = sum((dict(model.named_parameters())[name].grad * direction).sum() for name, direction in moved.items())
    step, ends = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for name, direction in moved.items():
                dict(model.named_parameters())[name].add_(direction, alpha=sign * step)
            ends.append(value())
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 1e-6 * abs(slope)


def test_packed_documents_have_the_gradients_of_lone_ones() -> None:
    config = v4_config(mtp=None, moe=replace(MOE, balance_alpha=0.0))
    packed, lone = build(config).double(), build(config).double()
    tokens_BT, lengths = text(1, 150), (139, 11)
    cotangent_BTV = torch.randn(1, 150, VOCAB, dtype=torch.float64)
    document_BT = torch.tensor([[0] * 139 + [1] * 11])
    (packed(tokens_BT, document_BT=document_BT).logits * cotangent_BTV).sum().backward()
    for piece, above in zip(tokens_BT.split(lengths, 1), cotangent_BTV.split(lengths, 1), strict=True):
        (lone(piece).logits * above).sum().backward()
    assert_same_gradients(packed, lone)


# --- what is kept ------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_a_window_open_groups_and_entries_and_nothing_else(model: Model) -> None:
    state = model.new_state(1, max_rollback=3)
    with torch.no_grad():
        model(text(1, 300), state=state)
    window, overlapping, plain = (state.caches[layer] for layer in (0, 1, 2))
    assert window.parts.keys() == {"window"} and window["window"].values.shape == (1, 8 + 3, 10)
    assert overlapping["compressor"]["open"].values.shape == (1, 7 + 3, 2 * 20)
    assert overlapping["indexer"]["open"].values.shape == (1, 7 + 3, 2 * 16)
    assert plain["compressor"]["open"].values.shape == (1, 127 + 3, 2 * 10)
    assert [cache["compressor"]["entries"].counts_B.tolist() for cache in (overlapping, plain)] == [[75], [2]]
    assert plain.parts.keys() == {"window", "compressor"}
    assert state.nbytes == sum(cache.nbytes for cache in state.caches) + sum(
        track.nbytes for track in (state.places, state.positions, state.canonical)
    )


def test_attention_may_differ_from_block_to_block() -> None:
    sparse = DSAConfig(mla=ATTENTION, index_num_heads=16, index_head_dim=8, index_top_k=5)
    mixed = (ATTENTION, sparse, replace(V4, compress_ratios=(4,)))
    model, tokens_BT = build(whole(attention=mixed, num_layers=3)), text(2, 40)
    with torch.no_grad():
        assert_close_fp32(read(model, tokens_BT, (3, 20, 21)), model(tokens_BT).logits)
    assert [type(block.attn).__name__ for block in model.blocks] == ["MLA", "DSA", "V4Attention"]
    assert model.mtp[0].block.attn.config.ratio == 0
    with pytest.raises(ConfigError, match="attention lists 3 blocks; num_layers is 2"):
        whole(attention=mixed, num_layers=2, engram=None)


def test_experts_of_a_token_id_are_distinct_and_evenly_drawn() -> None:
    table_VK = Model(v4_config()).blocks[0].ffn.table_VK
    assert (table_VK[:, 0] != table_VK[:, 1]).all()
    assert torch.bincount(table_VK.flatten(), minlength=5).min() > 0
    out = build(v4_config()).train()(text(2, 8), targets_BT=text(2, 8))
    assert "blocks.0.ffn" in out.loads and int(out.loads["blocks.0.ffn"].sum()) == 2 * 8 * 2


def test_no_tensor_of_queries_times_keys_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of 2048 tokens: no tensor has room for every pair of them, nor for every pair of token and entry."""
    length, sizes = 2048, []
    config = bare(num_layers=2, dim=8, attention=replace(V4, compress_ratios=(4, 128), index_num_heads=2))

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in torch.utils._pytree.tree_leaves(out) if isinstance(part, Tensor))
            return out

    model, tokens_BT = Model(config).train(), text(1, length)
    with Watch():
        losses = model(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses
        (losses["next_token"] + losses["indexer"]).backward()
    assert max(sizes) < length * length // 4
