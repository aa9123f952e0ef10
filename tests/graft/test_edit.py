"""Facts in a run's memory: written within a bound, taken back bitwise, and never half on the disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import byrote
from byrote.checkpoint.local import save
from byrote.cli.main import main
from byrote.errors import CheckpointError, ConfigError
from byrote.eval.bits import bits_per_byte, window_nats
from byrote.graft import edit, journal
from byrote.graft.edit import EditConfig, Entry, HeldOut, forget_fact, put_back, resting_on, write_fact
from byrote.graft.facts import Fact, recall
from byrote.graft.journal import EditableRun
from byrote.memory.canonical import canonical_ids
from byrote.model.config import EngramConfig, MLAConfig, ModelConfig, ResidualConfig
from byrote.model.transformer import Model
from byrote.tokenizer.bpe import Tokenizer, train_bpe
from tests.graft.trained import METALS, SYLLABLES, animal_text, planet_text
from tests.tolerances import assert_bitwise

FACTS = [Fact("The metal of Zakomir is", " nickel"), Fact("The metal of Telpunor is", " zinc"), Fact("The metal of Vexshilan is", " tin")]
CONFIG = EditConfig(steps=200, lr=0.1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([animal_text(number) for number in range(20)] + [planet_text(number) for number in range(20)], 400)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    """A model that has learnt the animals for a few steps."""
    texts = [tokenizer.token_strings()[token] for token in range(400)]
    class_V, classes = canonical_ids([tokenizer.decode_one(token) for token in range(400)], texts)
    engram = EngramConfig(
        layers=(1,), rows_per_order=4001, head_dim=8, num_heads=2, canonical_vocab=classes, pad_token=tokenizer.pad_id, table_std=0.02
    )
    attention = MLAConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    config = ModelConfig(
        vocab_size=400,
        dim=32,
        num_layers=2,
        attention=attention,
        ffn_hidden=48,
        residual=ResidualConfig(kind="plain"),
        engram=engram,
        init_std=0.2,
    )
    model = Model(config)
    assert model.memory is not None
    model.memory.set_canonical(class_V)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number in range(25):
        ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(animal_text(number))]])
        model(ids[:, :-1], targets_BT=ids[:, 1:]).losses["next_token"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def held(model: Model, tokenizer: Tokenizer) -> HeldOut:
    return HeldOut(model, tokenizer, [(f"held-{number}", animal_text(300 + number, sentences=10)) for number in range(3)])


@pytest.fixture
def folder(model: Model, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save(model, path, tokenizer=tokenizer)
    return path


def rows_of(model: Model) -> torch.Tensor:
    store: Any = model.memory.store  # type: ignore[union-attr]
    return store.vectors_NE.clone()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_fact_is_recalled_after_writing_and_held_out_text_feels_no_more_than_the_bound(
    model: Model, tokenizer: Tokenizer, held: HeldOut
) -> None:
    before, bits = rows_of(model), held.bits()
    assert recall(model, tokenizer, FACTS).as_written == 0
    attempts = [write_fact(model, tokenizer, fact, held, CONFIG) for fact in FACTS]
    assert recall(model, tokenizer, FACTS).as_written == 1
    for attempt in attempts:
        assert attempt.entry is not None and attempt.nats_after < attempt.nats_before
        assert attempt.felt_bits <= CONFIG.max_bits
    changed = (rows_of(model) != before).any(1).nonzero()[:, 0]
    written = torch.cat([attempt.entry.rows_W for attempt in attempts if attempt.entry is not None]).unique()
    assert torch.equal(changed, changed[torch.isin(changed, written)]), "only rows of the facts' own n-grams"
    felt = (held.bits() - bits) / held.num_bytes
    assert felt <= sum(attempt.felt_bits for attempt in attempts) + 1e-6
    if all(attempt.reads == 0 for attempt in attempts):
        assert felt == 0, "no row that held-out text reads was touched"


def test_windows_read_again_only_where_rows_moved_give_the_bits_of_all_text_read_again(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [(f"held-{number}", animal_text(300 + number, sentences=40)) for number in range(2)]
    texts.append(("itself", f"{FACTS[0].prompt} copper. " + animal_text(400, sentences=5)))
    held, batches = HeldOut(model, tokenizer, texts), list[int]()

    def bits() -> float:
        return sum(one.bits for one in bits_per_byte(model, tokenizer, texts, context=256, stride=128).per_text)

    assert held.bits() == pytest.approx(bits(), abs=1e-3)
    alone = held.bits()
    entry = write_fact(model, tokenizer, Fact(FACTS[0].prompt, " copper"), held, replace(CONFIG, max_bits=9.0)).entry
    assert entry is not None

    def counted(model: Any, lines: Any, windows: Any, pad: int, **options: Any) -> torch.Tensor:
        batches.append(len(windows))
        return window_nats(model, lines, windows, pad, **options)

    monkeypatch.setattr(edit, "window_nats", counted)
    assert held.bits() == pytest.approx(bits(), abs=1e-3) and abs(held.bits() - alone) > 1
    put_back(model.memory, entry)  # type: ignore[arg-type]
    assert held.bits() == alone and held.bits(entry.rows_W) < alone
    assert sum(batches) < len(held._windows), "most windows were known"


def test_facts_that_share_n_grams_are_written_beside_one_another(model: Model, tokenizer: Tokenizer, held: HeldOut) -> None:
    alike = [Fact(f"The metal of Za{middle}mir is", f" {metal}") for middle, metal in zip(SYLLABLES[:4], METALS[:4], strict=True)]
    entries, alone = list[Entry](), rows_of(model)
    for fact in alike:
        entry = write_fact(model, tokenizer, fact, held, CONFIG, entries).entry
        entries += [entry] if entry is not None else []
    assert len(entries) == len(alike) and recall(model, tokenizer, alike).as_written == 1
    memory: Any = model.memory
    memory.store.vectors_NE.copy_(alone)
    for fact in alike:
        write_fact(model, tokenizer, fact, held, CONFIG)
    assert recall(model, tokenizer, alike).as_written < 1, "without looking after earlier facts, some are written over"


def test_a_fact_beyond_the_bound_is_not_written_and_nothing_changes(model: Model, tokenizer: Tokenizer, held: HeldOut) -> None:
    """The held-out text says otherwise, and the model knows what it says."""
    assert write_fact(model, tokenizer, Fact(FACTS[0].prompt, " copper"), held, CONFIG).entry is not None
    before = rows_of(model)
    own = HeldOut(model, tokenizer, [("itself", f"{FACTS[0].prompt} copper")])
    attempt = write_fact(model, tokenizer, FACTS[0], own, EditConfig(steps=100, lr=0.1, max_bits=0.0))
    assert attempt.entry is None and attempt.felt_bits > 0
    assert_bitwise(rows_of(model), before)


def test_forgetting_in_any_order_is_bitwise_where_no_rows_are_shared(model: Model, tokenizer: Tokenizer, held: HeldOut) -> None:
    before = rows_of(model)
    entries = [attempt.entry for fact in FACTS if (attempt := write_fact(model, tokenizer, fact, held, CONFIG)).entry]
    while entries:
        place = next(place for place in range(len(entries)) if not resting_on(entries, place))
        entries = forget_fact(model, tokenizer, entries, place, rewrite=False)
    assert_bitwise(rows_of(model), before)


def test_a_fact_below_another_is_refused_or_the_other_is_written_again(model: Model, tokenizer: Tokenizer, held: HeldOut) -> None:
    before = rows_of(model)
    first = write_fact(model, tokenizer, FACTS[0], held, CONFIG).entry
    second = write_fact(model, tokenizer, Fact(FACTS[0].prompt, " silver"), held, CONFIG).entry
    assert first is not None and second is not None
    assert resting_on([first, second], 0) == [1]
    both = rows_of(model)
    with pytest.raises(ConfigError, match=r"1 later facts share rows.*silver.*--rewrite"):
        forget_fact(model, tokenizer, [first, second], 0, rewrite=False)
    assert_bitwise(rows_of(model), both)
    with pytest.raises(ConfigError, match="cannot be written again"):
        forget_fact(model, tokenizer, [first, second], 0, rewrite=True, held=held, config=EditConfig(steps=1, lr=1e-6))
    assert_bitwise(rows_of(model), both)
    (again,) = forget_fact(model, tokenizer, [first, second], 0, rewrite=True, held=held, config=CONFIG)
    assert again.answer == " silver" and torch.equal(again.before_WE, before[again.rows_W]), "it lies on the table as it was at first"
    put_back(model.memory, again)  # type: ignore[arg-type]
    assert_bitwise(rows_of(model), before)


def test_on_the_disk_a_fact_written_and_forgotten_leaves_every_file_bitwise(folder: Path, tokenizer: Tokenizer) -> None:
    before = files_of(folder)
    run = EditableRun(folder)
    held = HeldOut(run.model, tokenizer, [("held", animal_text(300))])
    entry = write_fact(run.model, tokenizer, FACTS[0], held, CONFIG).entry
    assert entry is not None
    run.save([entry])
    loaded, _ = byrote.load(folder)
    assert recall(loaded, tokenizer, FACTS[:1]).as_written == 1
    again = EditableRun(folder)
    assert [(one.prompt, one.answer) for one in again.entries] == [(FACTS[0].prompt, FACTS[0].answer)]
    again.save(forget_fact(again.model, tokenizer, again.entries, 0, rewrite=False))
    assert files_of(folder) == before
    assert EditableRun(folder).entries == []


@pytest.mark.parametrize("stop", ["before the checkpoint", "after the checkpoint"])
def test_a_change_that_stops_between_journal_and_checkpoint_is_whole_or_absent(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    run = EditableRun(folder)
    held = HeldOut(run.model, tokenizer, [("held", animal_text(300))])
    entry = write_fact(run.model, tokenizer, FACTS[0], held, CONFIG).entry
    assert entry is not None

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    if stop == "before the checkpoint":
        monkeypatch.setattr(run, "_save_checkpoint", die)
    else:
        monkeypatch.setattr(journal.os, "replace", _only_checkpoints(die))
    with pytest.raises(KeyboardInterrupt):
        run.save([entry])
    monkeypatch.undo()
    again = EditableRun(folder)
    assert [one.prompt for one in again.entries] == ([] if stop == "before the checkpoint" else [FACTS[0].prompt])
    assert recall(again.model, tokenizer, FACTS[:1]).as_written == len(again.entries)


def _only_checkpoints(die: Any) -> Any:
    """`os.replace` that fails for the journal's last step alone."""
    replace = journal.os.replace

    def replacing(source: Any, target: Any) -> None:
        if Path(source).name.endswith(journal.NEXT):
            die()
        replace(source, target)

    return replacing


def test_a_table_changed_by_others_and_a_damaged_journal_are_told(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    run = EditableRun(folder)
    entry = write_fact(run.model, tokenizer, FACTS[0], HeldOut(run.model, tokenizer, [("held", animal_text(300))]), CONFIG).entry
    assert entry is not None
    run.save([entry])
    whole = run.journal.read_bytes()
    save(model, folder, tokenizer=tokenizer)  # the table without the fact
    with pytest.raises(CheckpointError, match="tells of another table"):
        EditableRun(folder)
    run.journal.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"facts\.safetensors"):
        EditableRun(folder)


def test_the_command_line_writes_lists_measures_and_forgets(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = tmp_path / "held.txt"
    held.write_text(animal_text(300))
    options = ["--held", str(held), "--lr", "0.1", "--steps", "200", "--json"]
    assert main(["memory", "write", str(folder), FACTS[0].prompt, FACTS[0].answer, *options]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["fact"] == 1 and written["rows"] > 0 and written["nats_after"] < written["nats_before"]
    assert main(["memory", "write", str(folder), FACTS[0].prompt, FACTS[0].answer, *options]) == 0
    assert json.loads(capsys.readouterr().out)["fact"] is None, "what is known is not written a second time"
    assert main(["memory", "facts", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["prompt"] == FACTS[0].prompt
    assert main(["memory", "damage", str(folder), "--held", str(held), "--json"]) == 0
    damage = json.loads(capsys.readouterr().out)
    assert damage["recalled"] == {"before": 0.0, "after": 1.0}
    change = damage["bits_per_byte"]["after"] - damage["bits_per_byte"]["before"]
    assert change == pytest.approx(written["felt_bits_per_byte"], abs=1e-6)
    assert main(["memory", "forget", str(folder), FACTS[0].prompt]) == 0
    assert main(["memory", "forget", str(folder), "1"]) == 2
    assert "no fact '1'" in capsys.readouterr().err
    shutil.rmtree(folder)


def test_the_probe_shows_gates_visits_and_what_the_text_costs_without_memory(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, page = tmp_path / "task.txt", tmp_path / "page.html"
    task.write_text("The fox <sees> the öwl.\nThe 🦊.")
    assert main(["memory", "probe", str(folder), str(task), "--html", str(page), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    tokens = shown["tokens"][str(task)]
    assert "".join(one["text"] for one in tokens) == task.read_text()
    assert all(0 <= one["gate"] <= 1 for one in tokens) and len({one["gate"] for one in tokens}) > 1
    assert shown["tasks"][0]["with_memory"] != shown["tasks"][0]["without"]
    assert "&lt;" in page.read_text() and page.read_text().count("<span") == len(tokens)
