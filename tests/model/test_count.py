"""Counting: equal to the built model where one can be built, to published tensor lists where not."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from byrote.errors import ConfigError
from byrote.memory.table import DeviceTable
from byrote.model import count
from byrote.model.config import DSAConfig, EngramConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig, ResidualConfig, V4AttentionConfig
from byrote.model.transformer import Model
from byrote.optim.groups import treatment

MLA = MLAConfig(num_heads=3, q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
DSA = DSAConfig(mla=MLA, index_num_heads=2, index_head_dim=8, index_top_k=5)
V4 = V4AttentionConfig(
    num_heads=4,
    head_dim=6,
    rope_head_dim=4,
    q_lora_rank=7,
    o_groups=2,
    o_lora_rank=5,
    sliding_window=3,
    compress_ratios=(0, 4, 128),
    index_num_heads=3,
    index_head_dim=4,
    index_top_k=2,
)
ENGRAM = EngramConfig(layers=(0, 2), rows_per_order=23, head_dim=3, num_heads=2, max_order=3)
FULL = ModelConfig(
    vocab_size=37,
    dim=18,
    num_layers=3,
    attention=MLA,
    ffn_hidden=29,
    moe=MoEConfig(num_experts=5, top_k=2, expert_hidden=7, num_shared=2),
    residual=ResidualConfig(num_streams=3, sinkhorn_iters=2),
    engram=ENGRAM,
    mtp=MTPConfig(depth=2),
)
VARIANTS = {
    "every part": FULL,
    "full-rank queries": replace(FULL, attention=replace(MLA, q_lora_rank=None)),
    "plain residual": replace(FULL, residual=ResidualConfig(kind="plain")),
    "hyper-connections": replace(FULL, residual=ResidualConfig(kind="hc", num_streams=4)),
    "two streams": replace(FULL, residual=ResidualConfig(num_streams=2)),
    "no experts": replace(FULL, moe=None),
    "no shared expert": replace(FULL, moe=replace(FULL.moe, num_shared=0)),
    "one expert, no dense block": replace(FULL, moe=MoEConfig(num_experts=1, top_k=1, expert_hidden=3, num_dense_layers=0)),
    "DSA": replace(FULL, attention=DSA),
    "V4 and its MTP": replace(
        FULL, num_layers=3, engram=None, attention=V4, moe=replace(FULL.moe, num_hash_layers=2), mtp=MTPConfig(form="streams")
    ),
    "a kind for each block": replace(FULL, attention=(MLA, DSA, replace(V4, compress_ratios=(4,)))),
    "only dense blocks": replace(FULL, moe=replace(FULL.moe, num_dense_layers=9)),
    "no memory": replace(FULL, engram=None),
    "memory without convolution": replace(FULL, engram=replace(ENGRAM, conv_kernel=0)),
    "memory of fourth order": replace(FULL, engram=replace(ENGRAM, max_order=4, rows_per_order=(7, 11, 13))),
    "no multi-token prediction": replace(FULL, mtp=None),
    "nothing but a transformer": ModelConfig(
        vocab_size=11, dim=8, num_layers=1, attention=MLA, ffn_hidden=1, residual=ResidualConfig(kind="plain")
    ),
}

# The tiny V4 of the released architecture in transformers, which has 426,925 parameters and no MTP module.
TINY_V4 = ModelConfig(
    vocab_size=256,
    dim=64,
    num_layers=4,
    attention=V4AttentionConfig(
        num_heads=4,
        head_dim=32,
        rope_head_dim=8,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        sliding_window=16,
        compress_ratios=(0, 4, 128, 4),
        index_num_heads=32,
        index_head_dim=16,
        index_top_k=16,
    ),
    ffn_hidden=32,
    moe=MoEConfig(num_experts=8, top_k=2, expert_hidden=32, num_dense_layers=0, num_hash_layers=1),
)


@pytest.mark.parametrize("name", VARIANTS)
def test_count_equals_the_parameters_of_the_built_model(name):
    model = Model(VARIANTS[name])
    assert count.count_parameters(VARIANTS[name]).trained == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_matrix_parts_are_those_the_optimizer_treats_as_matrices(name):
    model = Model(VARIANTS[name])
    roles = model.param_roles()
    built = sum(parameter.numel() for key, parameter in model.named_parameters() if treatment(roles[key]).is_matrix)
    counted = count.count_parameters(VARIANTS[name])
    parts = counted.main + counted.mtp
    assert sum(parts[part] for part in count.MATRIX_PARTS) == built
    assert count.optimizer_bytes(counted, "muon") == 4 * built + 8 * (counted.trained - built)
    assert count.optimizer_bytes(counted, "adamw") == 8 * counted.trained


@pytest.mark.parametrize("name", ["every part", "only dense blocks", "no experts"])
def test_buffers_are_the_balancing_biases_of_the_built_model(name):
    model = Model(VARIANTS[name])
    biases = sum(buffer.numel() for key, buffer in model.named_buffers() if "bias" in key)
    assert count.count_buffers(VARIANTS[name]) == biases


@pytest.mark.parametrize("name", ["every part", "memory of fourth order"])
def test_table_is_what_the_built_memory_holds(name):
    config = VARIANTS[name]
    store = Model(config).memory.store
    assert count.count_parameters(config).table == store.vectors_NE.numel()
    assert count.table_bytes(config) == store.vectors_NE.nbytes


@pytest.mark.parametrize(("rule", "state_dim"), [("rowwise", 1), ("adam", 2 * ENGRAM.head_dim)])
def test_table_state_is_what_a_store_keeps_beside_its_rows(rule, state_dim):
    store = DeviceTable(sum(count.table_rows(FULL)), ENGRAM.head_dim, state_dim=state_dim)
    assert count.table_optimizer_bytes(FULL, rule) == store.state_NS.nbytes + store.visits_N.nbytes


def test_table_reads_double_with_the_bytes_of_a_number():
    half = replace(FULL, engram=replace(ENGRAM, table_dtype="bfloat16"))
    assert count.table_read_bytes(FULL) == 2 * count.table_read_bytes(half) == 2 * 4 * 3 * 4  # layers · rows · numbers · bytes


def test_v4_count_equals_the_known_parameters_of_a_tiny_model():
    assert count.count_parameters(TINY_V4).trained == 426_925


def test_hash_routed_blocks_keep_a_row_of_experts_per_token_instead_of_a_bias():
    plain = replace(TINY_V4, moe=replace(TINY_V4.moe, num_hash_layers=0))
    assert count.count_buffers(plain) == 4 * 8
    assert count.count_buffers(TINY_V4) == 3 * 8 + 256 * 2


def test_published_row_totals_of_v41_need_its_very_primes():
    memory = EngramConfig(layers=(1, 14), rows_per_order=16_000_000, head_dim=256, max_order=4)
    config = replace(FULL, num_layers=15, engram=memory)
    assert count.table_rows(config) == (384_006_168, 384_016_682)
    assert count.count_parameters(config).table == 768_022_850 * 256


def test_vocabulary_conventions_differ_by_one_matrix_each():
    counted, matrix = count.count_parameters(FULL), 37 * 18
    assert counted.total(vocabulary=2) - counted.total(vocabulary=1) == counted.total(vocabulary=1) - counted.total(vocabulary=0) == matrix
    assert counted.active_total(vocabulary=2) - counted.active_total(vocabulary=0) == 2 * matrix


def test_total_with_mtp_is_trained_plus_table_and_stored_adds_copies():
    counted = count.count_parameters(FULL)
    assert counted.total(mtp="own") == counted.trained + counted.table
    assert counted.total(mtp="stored") == counted.total(mtp="own") + 2 * 2 * 37 * 18  # two modules, embedding and head


def test_with_every_expert_chosen_all_of_the_main_model_is_active():
    config = replace(FULL, moe=replace(FULL.moe, top_k=5), engram=None)
    counted = count.count_parameters(config)
    assert counted.active == counted.main
    assert counted.active_total() == counted.total()


def test_one_more_expert_per_token_adds_its_three_matrices_in_every_moe_block():
    more = replace(FULL, moe=replace(FULL.moe, top_k=3))
    gain = count.count_parameters(more).active_total() - count.count_parameters(FULL).active_total()
    assert gain == 2 * 3 * 18 * 7


@pytest.mark.parametrize("sequence", [1, 2, 7, 257])
@pytest.mark.parametrize(("ratio", "limit"), [(1, None), (1, 16), (4, None), (4, 5), (128, None)])
def test_mean_entries_equals_the_sum_over_positions(sequence, ratio, limit):
    seen = [position // ratio for position in range(1, sequence + 1)]
    seen = seen if limit is None else [min(entries, limit) for entries in seen]
    assert count.mean_entries(sequence, ratio, limit) == pytest.approx(sum(seen) / sequence, rel=1e-12)


def test_forward_flops_equal_those_torch_counts(monkeypatch):
    """torch counts the whole square of scores, we the causal half: compare with every position seeing `sequence` keys.

    Value heads as wide as query heads: the model pads narrower ones for the fused kernel, which is no work of the architecture.
    """
    monkeypatch.setattr("byrote.kernels.native.can_take", lambda *_: False)  # torch does not see into C either
    config, sequence = replace(VARIANTS["nothing but a transformer"], attention=replace(MLA, v_head_dim=10)), 7
    model = Model(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # torch does not count the fused one
        model(torch.zeros(1, sequence, dtype=torch.long))
    ours = count.forward_flops(config, sequence)
    square = ours["attention_scores"] * sequence / count.mean_entries(sequence)
    assert counter.get_total_flops() == pytest.approx(sequence * (sum(ours.values()) - ours["attention_scores"] + square), rel=1e-12)


def test_training_is_three_times_forward_and_mtp_runs_the_head_again():
    without = replace(FULL, mtp=None)
    forward = sum(count.forward_flops(without, 33).values())
    assert count.training_flops(without, 33) == pytest.approx(3 * forward)
    assert sum(count.forward_flops(FULL, 33).values()) == forward
    assert count.mtp_flops(FULL, 33) > 2 * 2 * 37 * 18


def test_only_attention_scores_depend_on_the_sequence():
    short, long = (count.forward_flops(FULL, sequence) for sequence in (64, 128))
    assert {name for name in short if short[name] != long[name]} == {"attention_scores"}
    assert long["attention_scores"] == pytest.approx(short["attention_scores"] * 129 / 65)


def test_hyper_connection_flops_exceed_its_parameters_because_streams_share_them():
    config = VARIANTS["hyper-connections"]
    assert count.forward_flops(config, 8)["residual"] > 2 * count.count_parameters(config).main["residual"]
    assert "residual" not in count.forward_flops(VARIANTS["plain residual"], 8)


def test_compressed_attention_costs_less_than_dense_at_long_context_and_the_same_below_the_window():
    window_only = replace(TINY_V4, attention=replace(TINY_V4.attention, compress_ratios=(0, 0, 0, 0)))
    assert count.forward_flops(window_only, 100_000)["attention_scores"] < 100 * count.forward_flops(window_only, 16)["attention_scores"]
    assert count.forward_flops(window_only, 3)["attention_scores"] == 2 * 4 * (4 * 2 * 32) * 2  # four blocks, two keys in the mean


def test_cache_of_mla_is_the_latent_and_rope_key_of_every_block():
    assert count.cache_size(FULL).numbers_per_token == 3 * (10 + 4)
    assert count.cache_size(FULL).bytes_per_token == 2 * 3 * 14


def test_fp8_weights_lie_between_half_and_all_of_bf16():
    sizes = count.weight_bytes(count.count_parameters(FULL))
    assert sizes["fp32"] == 2 * sizes["bf16"]
    assert sizes["bf16"] / 2 < sizes["fp8"] < sizes["bf16"]


def test_compress_ratios_must_name_every_block_with_a_known_ratio():
    with pytest.raises(ConfigError, match="compress_ratios has 4 entries"):
        replace(TINY_V4, num_layers=5)
    with pytest.raises(ConfigError, match=r"\[8\]; allowed: 0"):
        replace(TINY_V4.attention, compress_ratios=(8,))
