"""Presets against the figures their papers print, and the ledger against published bills."""

from dataclasses import replace

import pytest

from byrote.errors import ConfigError
from byrote.model import count, ledger
from byrote.model.config import DSAConfig, MLAConfig, V4AttentionConfig
from byrote.model.plan import model_plan, published_runs, published_tokens
from byrote.model.presets import PRESETS, PUBLISHED, PUBLISHED_TOKENS, load_preset
from byrote.model.profiles import apply_profile

COUNTED = {name: count.count_parameters(load_preset(name)) for name in PRESETS}
OURS = ("tiny", "small", "base")


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(OURS)))
def test_total_lies_within_one_percent_of_the_published_one(name):
    totals = [figure for figure in PUBLISHED[name] if figure.quantity == "total"]
    for printed in {figure.figure for figure in totals}:
        readings = [figure.ours(COUNTED[name]) / printed - 1 for figure in totals if figure.figure == printed]
        assert min(map(abs, readings)) < 0.01


@pytest.mark.parametrize("name", [name for name in PUBLISHED if any(figure.quantity == "active" for figure in PUBLISHED[name])])
def test_active_parameters_round_to_the_published_figure(name):
    (active,) = (figure for figure in PUBLISHED[name] if figure.quantity == "active")
    assert abs(active.ours(COUNTED[name]) - active.figure) <= active.half_unit


def test_mhc_27b_and_engram_27b_meet_their_papers_only_in_their_own_conventions():
    mhc, engram = COUNTED["mhc-27b"], COUNTED["engram-27b"]
    assert f"{mhc.total(vocabulary=2) / 1e9:.2f} {mhc.active_total(vocabulary=1) / 1e9:.2f}" == "27.05 4.14"
    assert f"{mhc.total(vocabulary=1) / 1e9:.2f} {mhc.active_total(vocabulary=0) / 1e9:.1f}" == "26.72 3.8"  # the MoE-27B of Engram
    assert f"{engram.total(vocabulary=1) / 1e9:.1f}" == "26.7"


def test_engram_tables_have_the_rows_of_real_primes():
    assert COUNTED["engram-27b"].table_rows == (36_199_972, 36_204_260)
    assert COUNTED["engram-27b"].table == 72_404_232 * 80
    assert COUNTED["engram-40b"].table == 231_678_892 * 80


def test_v3_with_its_mtp_module_is_what_the_released_files_hold():
    assert COUNTED["v3"].mtp.total() == pytest.approx(11.6e9, rel=0.01)
    assert COUNTED["v3"].total(mtp="stored") == pytest.approx(685e9, rel=0.001)


def test_v4_cache_in_the_released_layout_is_the_known_number_of_bytes():
    assert int(count.cache_size(load_preset("v4-flash")).bytes_per_token) == 3514
    assert count.cache_size(load_preset("v4-pro")).bytes_per_token == pytest.approx(5.0e3, rel=0.01)
    assert count.cache_size(load_preset("v3")).numbers_per_token == 576 * 61


@pytest.mark.parametrize("name", ["engram-27b", "v4-lite-200b", "v4-1t", "small", "base"])
def test_memory_takes_about_a_quarter_of_the_sparse_parameters(name):
    counted = COUNTED[name]
    sparse = counted.total(vocabulary=0) - counted.active_total(vocabulary=0)
    assert 0.2 < counted.table / sparse < 0.35


@pytest.mark.parametrize("name", OURS)
def test_own_sizes_have_every_part(name):
    config = load_preset(name)
    assert config.residual.kind == "mhc"
    assert config.residual.streams >= 2
    assert None not in (config.engram, config.moe, config.mtp)


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 1e6, 2e6), ("small", 80e6, 130e6), ("base", 400e6, 600e6)])
def test_own_sizes_are_as_large_as_they_say(name, low, high):
    assert low < COUNTED[name].active_total(vocabulary=1) < high


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="nearest: engram-27b"):
        load_preset("engram27b")


# --- ledger -----------------------------------------------------------------------------------------------------------


def test_published_bill_of_v3_adds_up():
    run = ledger.PUBLISHED_RUNS["v3"]
    assert run.device_hours == 2_788_000
    assert run.dollars == 5_576_000
    assert [stage.device_hours for stage in run.stages] == [2_664_000, 119_000, 5_000]
    assert PUBLISHED_TOKENS["v3"] == run.stages[0].tokens[0][0] == 14.8e12


def test_published_bill_of_r1_adds_up():
    run = ledger.PUBLISHED_RUNS["r1"]
    assert (run.device_hours, run.dollars) == (147_000, 294_000)


def test_v3_took_180_thousand_hours_per_trillion_tokens():
    assert published_runs()["v3"]["stages"][0]["hours_per_trillion_tokens"] == pytest.approx(180e3)


def test_mfu_implied_by_published_hours_gives_those_hours_back():
    stage = published_runs()["v3"]["stages"][0]
    assert 0.3 < stage["implied_mfu_bf16"] < 0.5
    cost = ledger.run_cost(stage["flops"], peak=ledger.DEVICES["H800"].bf16, mfu=stage["implied_mfu_bf16"], price=2.0)
    assert cost.device_hours == pytest.approx(2_664_000)
    assert cost.dollars == pytest.approx(5_328_000)


def test_stages_without_published_tokens_imply_nothing():
    r1 = published_runs()["r1"]["stages"]
    assert all("implied_mfu_bf16" not in stage for stage in r1)


def test_cost_scales_as_its_formula_says():
    one = ledger.run_cost(7e20, peak=1e15, mfu=0.35, price=3.0)
    assert one.device_hours == pytest.approx(7e20 / 0.35e15 / 3600)
    assert one.dollars == pytest.approx(3 * one.device_hours)
    assert ledger.run_cost(7e20, peak=2e15, mfu=0.35, price=None) == (7e20, pytest.approx(one.device_hours / 2), None)


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.5, 40.0])
def test_mfu_must_be_a_share(mfu):
    with pytest.raises(ConfigError, match="share of the peak"):
        ledger.run_cost(1e20, peak=1e15, mfu=mfu, price=None)


def test_devices_are_found_however_they_are_written_and_wrong_names_are_answered():
    assert ledger.find_device("rtx-4090")[0] == ledger.find_device("RTX4090")[0] == "RTX 4090"
    with pytest.raises(ConfigError, match="nearest: H100"):
        ledger.find_device("H101")


def test_only_an_unchanged_preset_is_compared_with_what_was_published():
    changed = replace(load_preset("mhc-3b"), dim=1024)
    assert model_plan("mhc-3b", load_preset("mhc-3b"), sequence=128)["published"]
    assert not model_plan("mhc-3b", changed, sequence=128)["published"]
    assert published_tokens("mhc-3b", changed) is None


# --- profiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", OURS)
def test_a_size_in_its_own_profile_is_itself(size):
    assert load_preset(f"{size}:rote") == load_preset(size)


@pytest.mark.parametrize(("profile", "kind"), [("v3", MLAConfig), ("v3.2", DSAConfig), ("v4", V4AttentionConfig)])
def test_a_profile_changes_the_architecture_and_not_the_size(profile, kind):
    config, plain = load_preset(f"small:{profile}"), load_preset("small")
    assert isinstance(config.attention, kind)
    assert (config.dim, config.num_layers, config.vocab_size) == (plain.dim, plain.num_layers, plain.vocab_size)
    assert config.engram is None and config.residual.kind == ("mhc" if profile == "v4" else "plain")
    ours, theirs = (count.count_parameters(part).active_total(vocabulary=0) for part in (config, plain))
    assert 0.6 < ours / theirs < 1.4


def test_what_is_in_the_profile_of_v4():
    config = load_preset("small:v4")
    assert config.attention.compress_ratios == (0, 0, *(4, 128) * 5)
    assert [config.is_hashed(layer) for layer in range(4)] == [True, True, True, False]
    assert all(config.is_moe(layer) for layer in range(12)) and config.mtp.form == "streams"


def test_a_profile_that_is_not_there_or_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"nearest: v3\.2"):
        load_preset("tiny:v3.3")
    with pytest.raises(ConfigError, match="starts from a size with latent attention"):
        load_preset("v4-flash:v3")
    with pytest.raises(ConfigError, match="'rote' has memory and mHC"):
        load_preset("mhc-3b:rote")
    with pytest.raises(ConfigError, match="experts in every block"):
        apply_profile(replace(load_preset("tiny"), moe=None), "v4")


def test_the_release_of_v32_is_v3_with_indexers():
    assert COUNTED["v3.2"].main - COUNTED["v3"].main == {"indexer": 61 * (1536 * 64 * 128 + 7168 * (64 + 128)), "norms": 61 * 256}
    assert count.cache_size(load_preset("v3.2")).numbers_per_token == 61 * (576 + 128)
