"""`byrote plan` from the outside."""

import json

import pytest

from byrote.cli import plan
from byrote.cli.main import main
from byrote.data.config import DataConfig, SourceConfig
from byrote.model.presets import PRESETS, load_preset
from byrote.train.run import RunConfig, TrainConfig


def planned(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"small", "base"}))
def test_every_preset_prints_and_its_json_agrees_with_itself(capsys, name):
    assert main(["plan", name]) == 0
    assert "counted" in capsys.readouterr().out
    values = planned(capsys, name)
    parts, totals = values["parameters"], values["totals"]
    assert sum(row["total"] + row["mtp"] for row in parts.values()) == totals["trained"]
    assert sum(row["forward_flops"] for row in parts.values()) == pytest.approx(values["flops_per_token"]["forward"])
    assert totals["by_vocabulary_counted"]["twice"]["total"] + totals["mtp"] == totals["with_mtp"] == totals["trained"] + totals["memory"]


def test_v3_prints_its_published_figures_and_bills(capsys):
    assert main(["plan", "v3"]) == 0
    out = capsys.readouterr().out
    for text in ("671B", "685B", "2,788,000", "$5,576,000", "180,000", "147,000", "$294,000", "twice", "once", "not at all"):
        assert text in out


def test_both_readings_of_v4_pro_are_printed(capsys):
    assert main(["plan", "v4-pro"]) == 0
    out = capsys.readouterr().out
    for text in ("1.6T", "1.573T", "-1.69%", "1.599T", "-0.07%"):
        assert text in out


def test_published_runs_are_not_shown_for_a_changed_model(capsys):
    values = planned(capsys, "v3", "--model.num_layers", "60")
    assert values["published_runs"] == {}
    assert values["published"] == []
    assert values["cost"] is None


def test_overrides_change_the_model(capsys):
    parts = planned(capsys, "tiny", "--model.engram", "none", "--model.mtp", "none")
    assert parts["totals"]["memory"] == parts["totals"]["mtp"] == 0
    assert planned(capsys, "tiny", "--optim.matrix", "adamw")["bytes"]["optimizer"] > planned(capsys, "tiny")["bytes"]["optimizer"]


def test_cost_is_linear_in_tokens_and_price(capsys):
    one = planned(capsys, "tiny", "--tokens", "1B", "--device", "a100", "--price", "1.5", "--mfu", "0.25")["cost"]
    two = planned(capsys, "tiny", "--tokens", "2e9", "--device", "A100", "--price", "3", "--mfu", "0.25")["cost"]
    assert two["device_hours"] == pytest.approx(2 * one["device_hours"])
    assert two["dollars"] == pytest.approx(4 * one["dollars"])
    assert one["device_hours"] == pytest.approx(one["flops"] / (312e12 * 0.25 * 3600))


def test_no_price_is_invented(capsys):
    assert planned(capsys, "tiny", "--tokens", "1B", "--device", "H100")["cost"]["dollars"] is None
    assert main(["plan", "tiny", "--tokens", "1B", "--device", "H100"]) == 0
    assert "add --price" in capsys.readouterr().out


def test_this_machine_is_measured_only_when_asked(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("byrote.device.matmul_peak", lambda device, dtype: asked.append(device) or 5e10)
    planned(capsys, "tiny", "--tokens", "1M")
    assert asked == []
    cost = planned(capsys, "tiny", "--tokens", "1M", "--device", "this-machine")["cost"]
    assert len(asked) == 1
    assert cost["peak_flops"] == 5e10


def test_longer_sequences_cost_more_per_token(capsys):
    short, long = (planned(capsys, "tiny", "--sequence", length)["flops_per_token"]["training"] for length in ("257", "4096"))
    assert short < long


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("engram-28b",), "nearest: engram-27b"),
        (("tiny_gpu",), "nearest: tiny_cpu"),
        (("tiny", "--device", "H101", "--tokens", "1B"), "nearest: H100"),
        (("tiny", "--device", "H100"), "add --tokens"),
        (("tiny", "--mfu", "0.5"), "add --tokens"),
        (("tiny", "--tokens", "1B", "--mfu", "40"), "share of the peak"),
        (("tiny", "--tokens", "many"), "14.8T"),
        (("tiny", "--sequence", "0"), "at least 1 token"),
        (("tiny", "--model.moe.topk", "3"), "nearest: --model.moe.top_k"),
    ],
)
def test_what_cannot_be_used_is_answered_with_what_can(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_recipes_are_planned_at_their_own_sequence_and_tokens(capsys, monkeypatch):
    data = DataConfig(sources=(SourceConfig(path="notes"),), sequence_length=96, batch_sequences=3, accumulate=2)
    run = RunConfig(name="stand-in", model=load_preset("tiny"), data=data, train=TrainConfig(steps=7))
    monkeypatch.setattr(plan, "load_recipe", lambda name: run)
    values = planned(capsys, "tiny_cpu")
    assert values["flops_per_token"]["sequence"] == 96
    assert values["cost"]["tokens"] == 7 * 2 * 3 * 96


def test_the_plan_says_where_the_table_would_lie_and_what_that_takes(capsys):
    places = {store: planned(capsys, "tiny_cpu", "--table.store", store)["table"] for store in ("device", "host", "disk")}
    used = {store: {name for name, size in place.items() if name.endswith("_bytes") and size} for store, place in places.items()}
    assert used == {"device": {"device_bytes"}, "host": {"ram_bytes"}, "disk": {"ram_bytes", "disk_bytes"}}
    assert (
        places["disk"]["ram_bytes"]
        > planned(capsys, "tiny_cpu", "--table.store", "disk", "--table.cache_bytes", "4096")["table"]["ram_bytes"]
    )
    assert planned(capsys, "v3", "--table.store", "disk")["table"] is None
    assert main(["plan", "tiny_cpu", "--table.store", "disk"]) == 0
    assert "up to twice that with old records" in capsys.readouterr().out
