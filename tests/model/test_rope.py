"""Rotary frequencies against the released tables, and what rotation must and must not change."""

import math
from dataclasses import replace

import pytest
import torch

from byrote.errors import ConfigError
from byrote.model.config import RopeConfig, YarnConfig
from byrote.model.rope import amplitude, frequencies, rotate, rotation, softmax_factor
from tests.model.tiny_models import ATTENTION, bare, build, text
from tests.tolerances import assert_close_fp32

V4_YARN = RopeConfig(theta=160_000.0, yarn=YarnConfig(factor=16, original_positions=65_536))
V3_YARN = YarnConfig(factor=40, original_positions=4096)


def test_yarn_changes_the_pairs_of_the_published_table_and_no_others():
    factor_K = frequencies(64, V4_YARN) / frequencies(64, replace(V4_YARN, yarn=None))
    published = {16: 0.90625, 17: 0.8125, 18: 0.71875, 20: 0.53125, 22: 0.34375, 24: 0.15625}
    published |= dict.fromkeys(range(16), 1.0) | dict.fromkeys(range(25, 32), 0.0625)
    for pair, factor in published.items():
        assert factor_K[pair].item() == pytest.approx(factor, rel=1e-6)
    for pair, frequency in {1: 0.687656, 16: 2.265625e-3, 24: 1.953125e-5, 31: 5.680529e-7}.items():
        assert frequencies(64, V4_YARN)[pair].item() == pytest.approx(frequency, rel=1e-6)


def test_without_yarn_frequencies_fall_from_one_by_a_constant_factor():
    frequencies_K = frequencies(64, RopeConfig()).double()
    assert frequencies_K[0] == 1
    assert_close_fp32(frequencies_K[1:] / frequencies_K[:-1], torch.full((31,), 10_000 ** (-1 / 32), dtype=torch.float64))


def test_mscale_of_v3_is_squared_into_the_softmax_and_leaves_the_amplitude():
    mscale = 0.1 * math.log(40) + 1
    assert mscale == pytest.approx(1.368888, rel=1e-6)
    assert softmax_factor(V3_YARN) == pytest.approx(mscale**2)
    assert amplitude(V3_YARN) == 1.0
    without = replace(V3_YARN, mscale_all_dim=0.0)
    assert (softmax_factor(without), amplitude(without)) == (1.0, pytest.approx(mscale))
    unstretched = replace(V3_YARN, factor=1.0)
    assert (softmax_factor(unstretched), amplitude(unstretched)) == (1.0, 1.0)
    assert (softmax_factor(None), amplitude(None)) == (1.0, 1.0)


def test_the_scale_of_attention_follows_yarn():
    plain = build(bare()).blocks[0].attn.scale
    stretched = build(bare(attention=replace(ATTENTION, rope=RopeConfig(yarn=V3_YARN)))).blocks[0].attn.scale
    assert plain == pytest.approx(ATTENTION.qk_head_dim**-0.5)
    assert stretched / plain == pytest.approx(softmax_factor(V3_YARN))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rotation_keeps_norms_and_scores_depend_on_the_distance_alone(layout):
    query, key = torch.randn(2, 1, 1, 3, 8).unbind(0)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, rotation(torch.tensor([[position]]), 8, RopeConfig()), layout)

    assert_close_fp32(turned(query, 977).norm(dim=-1), query.norm(dim=-1))
    scores = [(turned(query, 5 + shift) * turned(key, 3 + shift)).sum(-1) for shift in (0, 1, 100)]
    assert_close_fp32(scores[1], scores[0])
    assert (scores[2] - scores[0]).abs().max() < 1e-4  # fp32 angles of larger positions
    assert torch.equal(turned(query, 0), query)


def test_layouts_are_one_another_with_channels_permuted():
    x, turn = torch.randn(1, 5, 2, 6), rotation(torch.arange(5)[None], 6, RopeConfig())
    order = torch.tensor([0, 2, 4, 1, 3, 5])  # even channels first: half pairs (i, i + 3) were interleaved pairs (2i, 2i + 1)
    assert_close_fp32(rotate(x[..., order], turn, "half"), rotate(x, turn, "interleaved")[..., order])


def test_layouts_give_other_models():
    interleaved, half = bare(), bare(attention=replace(ATTENTION, rope=RopeConfig(layout="half")))
    with torch.no_grad():
        assert (build(interleaved)(text(1, 9)).logits - build(half)(text(1, 9)).logits).abs().max() > 1e-3


def test_an_unknown_layout_and_an_odd_width_are_refused():
    with pytest.raises(ConfigError, match="interleaved, half"):
        RopeConfig(layout="neox")
    with pytest.raises(ConfigError, match="even"):
        replace(ATTENTION, qk_rope_head_dim=3)
