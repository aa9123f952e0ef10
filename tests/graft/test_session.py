"""A graft from text to pack on a model that the tests trained: it learns, it can be stopped, its controls learn less."""

import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from byrote.checkpoint.packs import open_pack
from byrote.errors import CapacityError, ConfigError, DataError, MemoryPackError
from byrote.graft import prepare
from byrote.graft.attach import attach, detach, grafts
from byrote.graft.card import table
from byrote.graft.controls import PACK_CONTROLS, lora
from byrote.graft.facts import Fact, read_facts, recall
from byrote.graft.grafted import Grafted
from byrote.graft.host import find_host, load_host
from byrote.graft.prepare import GraftConfig, engram_config, make_pack, prepare_data
from byrote.graft.session import Report, run_graft, work_folder
from byrote.graft.training import Training
from tests.graft.trained import animal_text, planet_text, planets, write_folder
from tests.tolerances import assert_bitwise

SIZES: dict[str, Any] = {
    "sequence_length": 64, "batch_sequences": 4, "head_dim": 4, "num_heads": 2, "rows_per_order": 2003, "lr": 3e-3, "row_lr": 0.05,
    "validation_bytes": 3000, "context": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("corpus")
    inside = write_folder(root / "planets", [planet_text(number) for number in range(20)])
    outside = write_folder(root / "animals", [animal_text(200 + number) for number in range(12)])
    catalogue = root / "planets.csv"
    catalogue.write_text("planet,metal\n" + "".join(f"{name},{metal}\n" for name, metal, _ in planets()[:12]))
    return {"text": (str(inside),), "outside": str(outside), "catalogue": str(catalogue)}


def config_for(corpus: dict[str, Any], **changes: Any) -> GraftConfig:
    return GraftConfig(**(SIZES | {"text": corpus["text"], "outside": corpus["outside"]} | changes))


def host_from(folder: Path) -> Any:
    return load_host(str(folder), device=torch.device("cpu"))


def run(config: GraftConfig, folder: Path, out: Path, stop_after: int | None = None, **options: Any) -> Report:
    stop, model_text = threading.Event(), host_from(folder)

    def progress(line: str) -> None:
        if stop_after is not None and f"step {stop_after}/" in line:
            stop.set()

    return run_graft(config, "host", *model_text, out, progress=progress, stop=stop, **options)


def test_a_graft_learns_its_domain_costs_little_outside_and_says_so_on_its_card(
    trained_host: Path, corpus: dict[str, Any], tmp_path: Path
) -> None:
    config, out = config_for(corpus, epochs=3.0, controls=("one-row", "shuffled")), tmp_path / "pack"
    report = run(config, trained_host, out)
    graft, one_row, shuffled = report.results
    assert report.before.inside is not None and graft.measured.inside is not None
    assert graft.measured.inside < 0.9 * report.before.inside, "the domain is learnt"
    assert shuffled.measured.inside is not None and one_row.measured.inside is not None
    assert graft.measured.inside < shuffled.measured.inside - 0.05, "more than by rows that say nothing"
    assert graft.measured.inside < one_row.measured.inside - 0.05, "more than by one vector behind a gate"
    assert graft.measured.outside < one_row.measured.outside, "text outside the domain feels less, as it reads other rows"
    assert not work_folder(out).exists()
    card_text = (out / "CARD.md").read_text()
    for number in (f"{graft.measured.inside:.4f}", f"{report.before.outside:.4f}", f"{one_row.measured.inside:.4f}", "1 seed (0)"):
        assert number in card_text
    assert "the metal" in (out / "top.json").read_text()
    check_the_written_pack_is_the_measured_one(out, trained_host, config, report)


def check_the_written_pack_is_the_measured_one(out: Path, folder: Path, config: GraftConfig, report: Report) -> None:
    model, text = host_from(folder)
    ids_BT = torch.tensor([[text.begin_id, *text.encode(planet_text(99))[:100]]])
    base = model(ids_BT).logits
    graft = attach(model, open_pack(out), tokenizer=text)
    grafted = Grafted(model, graft)(ids_BT, targets_BT=ids_BT.roll(-1, 1)).losses["next_token"]
    detach(model)
    alone = Grafted(model, None)(ids_BT, targets_BT=ids_BT.roll(-1, 1)).losses["next_token"]
    assert grafted < alone
    assert_bitwise(model(ids_BT).logits, base)


def test_stopped_anywhere_and_called_again_the_pack_is_bitwise_that_of_one_sitting(
    trained_host: Path, corpus: dict[str, Any], tmp_path: Path
) -> None:
    config = config_for(corpus, epochs=0.5)
    whole = run(config, trained_host, tmp_path / "whole")
    first = run(config, trained_host, tmp_path / "parts", stop_after=3)
    assert first.pack is None and not first.results and not (tmp_path / "parts").exists()
    with pytest.raises(ConfigError, match=r"lr was 0\.003, now 0\.5"):
        run(replace(config, lr=0.5), trained_host, tmp_path / "parts")
    second = run(config, trained_host, tmp_path / "parts", stop_after=7)
    assert second.pack is None
    third = run(config, trained_host, tmp_path / "parts")
    assert third.results[0].measured == whole.results[0].measured
    for name in ("table.bin", "layers.safetensors", "top.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with pytest.raises(ConfigError, match="never overwritten"):
        run(config, trained_host, tmp_path / "whole")


def test_a_catalogue_is_recalled_and_paraphrases_are_reported_beside_it(trained_host: Path, corpus: dict[str, Any], tmp_path: Path) -> None:
    config = config_for(
        corpus, text=(), facts=corpus["catalogue"], epochs=200.0, batch_sequences=2, row_lr=0.1, head_dim=8, num_heads=4, max_order=4
    )
    report = run(config, trained_host, tmp_path / "pack", with_text=False)
    before, after = report.before.recalled, report.results[0].measured.recalled
    assert len(before) == len(after) == 3
    assert report.before.inside is None
    assert before[0] < 0.4 and after[0] >= 0.8
    assert not (tmp_path / "pack" / "top.json").exists(), "--no-text"
    assert table(report)[0][4:] == ["facts recalled", "… paraphrase 1", "… paraphrase 2", "weights"]


def test_like_another_pack_freezes_its_projections_and_trains_rows_alone(
    trained_host: Path, corpus: dict[str, Any], tmp_path: Path
) -> None:
    config = config_for(corpus, epochs=0.3)
    run(config, trained_host, tmp_path / "first")
    run(replace(config, like=str(tmp_path / "first"), seeds=(1,)), trained_host, tmp_path / "second")
    first, second = open_pack(tmp_path / "first"), open_pack(tmp_path / "second")
    for (name, mine), (_, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert_bitwise(mine.data, theirs.data)
        assert name
    rows_U = torch.arange(first.memory.store.num_rows)
    assert (first.memory.store.read(rows_U) != second.memory.store.read(rows_U)).any()


@pytest.mark.parametrize("kind", PACK_CONTROLS)
def test_a_fresh_control_too_is_bitwise_the_host_and_what_it_names_is_what_is_missing(
    trained_host: Path, corpus: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    model, text = host_from(trained_host)
    config = config_for(corpus)
    data = prepare_data(config, text, tmp_path / "data", lambda line: None)
    pack = make_pack(config, engram_config(config, find_host(model), text, data.tokens), model, text, seed=0)
    ids_BT = torch.tensor([text.encode(planet_text(3))[:40]])
    whole_BTLN = pack.memory.global_rows(ids_BT)
    PACK_CONTROLS[kind](pack, 0)
    base = model(ids_BT).logits
    graft = attach(model, pack)
    assert_bitwise(model(ids_BT).logits, base)
    rows_BTLN = pack.memory.global_rows(ids_BT)
    if kind == "one-row":
        assert (rows_BTLN == rows_BTLN[:, :1]).all() and len(rows_BTLN[0, 0].unique()) == rows_BTLN[0, 0].numel()
    elif kind == "shuffled":
        assert not torch.equal(rows_BTLN, whole_BTLN) and torch.equal(rows_BTLN.sort(1).values, whole_BTLN.sort(1).values)
    training = Training(config, data, Grafted(model.requires_grad_(False), graft), text, tmp_path / "state", seed=0, learns_rows=False)
    store: Any = pack.memory.store
    before = store.vectors_NE.clone()
    training._step()
    training.loader.close()
    assert_bitwise(store.vectors_NE, before)
    assert not torch.equal(model(ids_BT).logits, base) or kind in ("one-row", "shuffled"), "zero rows that do not learn say nothing"
    detach(model)


def test_lora_has_about_as_many_weights_and_leaves_the_host_as_it_was(trained_host: Path) -> None:
    pytest.importorskip("peft", reason="the control lora needs the extra graft: pip install byrote[graft]")
    model, text = host_from(trained_host)
    ids_BT = torch.tensor([text.encode("The fox sees the owl.")])
    base = model(ids_BT).logits
    with lora(model, 20_000, 0) as (adapters, rank):
        weights = sum(parameter.numel() for parameter in adapters.parameters())
        assert 10_000 <= weights <= 30_000 and rank >= 1
    assert_bitwise(model(ids_BT).logits, base)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_tokenizer_is_read_as_its_strings_and_unused_ids_of_the_model_have_a_class(trained_host: Path) -> None:
    model, text = host_from(trained_host)
    class_V, classes = text.canonical(find_host(model).vocab_size)
    assert len(class_V) == 410 and text.vocab_size == 400 and int(class_V.max()) < classes
    the, The = (text.encode(word)[0] for word in (" the", "The"))
    assert the != The and class_V[the] == class_V[The]
    assert text.encode("<|end|>") != [text.end_id], "text never turns into a special token"
    assert text.decode(text.encode("The owl, 7 moons.")) == "The owl, 7 moons."


def test_what_cannot_be_grafted_is_said_before_anything_is_written(
    trained_host: Path, corpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
        GraftConfig()
    with pytest.raises(ConfigError, match="no-lookup, lora"):
        config_for(corpus, controls=("none",))
    with pytest.raises(ConfigError, match=r"seeds is \(1, 1\)"):
        config_for(corpus, seeds=(1, 1))
    with pytest.raises(ConfigError, match=r"block 7; the model has blocks 0\.\.2"):
        run(config_for(corpus, layers=(7,)), trained_host, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"context is 1024; the model reads 2\.\.256 tokens"):
        run(config_for(corpus, context=1024), trained_host, tmp_path / "b")
    with pytest.raises(DataError, match="does not exist"):
        run(config_for(corpus, text=("missing",)), trained_host, tmp_path / "c")
    with pytest.raises(ConfigError, match="no-model is no folder"):
        load_host(str(tmp_path / "no-model"), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_host(str(tmp_path), device=torch.device("cpu"))
    with pytest.raises(MemoryPackError, match="missing"):
        run(config_for(corpus, like=str(tmp_path / "missing")), trained_host, tmp_path / "d")
    assert not work_folder(tmp_path / "d").exists()
    monkeypatch.setattr("byrote.device.disk_free", lambda path: 1000)
    with pytest.raises(CapacityError, match="the state of the training and the pack"):
        prepare.check_fits_machine(
            engram_config(config_for(corpus), find_host(host_from(trained_host)[0]), host_from(trained_host)[1], 10),
            host_from(trained_host)[0],
            tmp_path,
        )
    assert grafts(host_from(trained_host)[0]) == []


def test_facts_are_read_from_tables_of_both_kinds(tmp_path: Path) -> None:
    stated = tmp_path / "stated.csv"
    stated.write_text("country,capital,calling_code\nAruba,Oranjestad,+297\nNauru,,+674\n")
    facts = read_facts(stated)
    assert facts[0] == Fact(
        "The capital of Aruba is", " Oranjestad", ("Aruba's capital is", "Question: What is the capital of Aruba? Answer:")
    )
    assert [fact.prompt for fact in facts[1:]] == ["The calling code of Aruba is", "The calling code of Nauru is"]
    lines = tmp_path / "lines.jsonl"
    rows = [{"country": "Angola", "languages": ["Portuguese", "Kongo"], "landlocked": False}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert [fact.answer for fact in read_facts(lines)] == [" Portuguese, Kongo"]
    asked = tmp_path / "asked.csv"
    asked.write_text("prompt,answer,paraphrase\nTwo and two make,four,2+2 is\n")
    assert read_facts(asked) == [Fact("Two and two make", " four", ("2+2 is",))]
    with pytest.raises(DataError, match="nearest: capital"):
        read_facts(stated, columns=("kapital",))
    (tmp_path / "empty.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="has no rows"):
        read_facts(tmp_path / "empty.csv")


def test_recall_counts_only_answers_said_token_for_token(trained_host: Path) -> None:
    model, text = host_from(trained_host)

    class Parrot(torch.nn.Module):
        """Says, after every token, the token that came with it in `line`."""

        def __init__(self, line: list[int]) -> None:
            super().__init__()
            self.embed = model.get_input_embeddings()
            self.after = dict(itertools.pairwise(line))

        def forward(self, tokens_BT: torch.Tensor, document_BT: torch.Tensor) -> Any:
            logits = torch.zeros(*tokens_BT.shape, 410)
            for row, line in enumerate(tokens_BT.tolist()):
                for place, token in enumerate(line):
                    logits[row, place, self.after.get(token, 0)] = 1
            return type("Output", (), {"logits": logits})

    known, other = Fact("The fox", " sees", ("A fox",)), Fact("The owl", " fears", ("An owl",))
    parrot = Parrot([text.begin_id, *text.encode("The fox"), *text.encode(" sees")])
    assert recall(parrot, text, [known, other]) == (2, 0.5, (0.5,))
