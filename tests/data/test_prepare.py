"""From files to batches, twice: the second time from what the first left."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from byrote.data import prepare as prepare_module
from byrote.data.config import DataConfig, SourceConfig
from byrote.data.prepare import Prepared, prepare
from byrote.errors import ConfigError, DataError
from byrote.tokenizer.bpe import Tokenizer
from tests.data.conftest import make_documents


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name, text in make_documents(60):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return tmp_path / "corpus"


@pytest.fixture
def config(corpus: Path) -> DataConfig:
    return DataConfig(
        sources=(SourceConfig(path=str(corpus)),), vocab_size=280, sequence_length=32, batch_sequences=4, validation_bytes=600
    )


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(prepare_module, "_build", refuse)


def first_batch(prepared: Prepared) -> torch.Tensor:
    with closing(prepared.train_loader()) as loader:
        return loader.next_batch().tokens_BT


def test_files_become_a_tokenizer_batches_and_unseen_validation(config: DataConfig, tmp_path: Path) -> None:
    stages: dict[str, tuple[int, int]] = {}
    prepared = prepare(config, tmp_path / "out", lambda stage, done, total: stages.update({stage: (done, total)}))
    trained = [prepared.tokenizer.decode(prepared.shards[0].document(n)) for n in range(prepared.shards[0].num_documents)]
    everything = {document.text for document in make_documents(60)}
    assert set(trained) | {document.text for document in prepared.validation} == everything
    assert not {document.text for document in prepared.validation} & set(trained)
    assert first_batch(prepared).shape == (4, 32)
    assert set(stages) == {"reading", "tokenizer", "tokenising"}
    assert stages["tokenising"][0] == stages["tokenising"][1] == prepared.facts["training"]["bytes"]
    assert prepared.facts["validation"]["documents"] == len(prepared.validation)
    assert prepared.facts["sources"][0]["documents"] == 60


def test_the_second_time_everything_is_found(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config, tmp_path / "out")
    no_work(monkeypatch)
    second = prepare(config, tmp_path / "out")
    assert second.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert (second.validation, second.facts) == (first.validation, first.facts)
    assert torch.equal(first_batch(first), first_batch(second))
    longer = prepare(replace(config, sequence_length=64, batch_sequences=2, seed=1), tmp_path / "out")  # no new tokens needed
    assert first_batch(longer).shape == (2, 64)


def test_two_machines_prepare_the_same(config: DataConfig, tmp_path: Path) -> None:
    first, second = (prepare(config, tmp_path / name) for name in ("one", "two"))
    assert first.shards[0].checksum == second.shards[0].checksum
    assert first.facts == second.facts


@pytest.mark.parametrize("change", ["text", "vocab_size", "validation_bytes"])
def test_a_change_of_corpus_or_configuration_prepares_again(config: DataConfig, corpus: Path, tmp_path: Path, change: str) -> None:
    first = prepare(config, tmp_path / "out")
    if change == "text":
        (corpus / "new.txt").write_text("something new " * 5)
    else:
        config = replace(config, **{change: 290})
    assert prepare(config, tmp_path / "out").shards[0].checksum != first.shards[0].checksum


@pytest.mark.parametrize(
    "damage", ["prepared.json", "validation.jsonl", "tokenizer/tokenizer.json", "source-0/manifest.json", "source-0/tokens-*"]
)
@pytest.mark.parametrize("how", ["gone", "torn", "altered"])
def test_whatever_is_damaged_is_made_again(config: DataConfig, tmp_path: Path, damage: str, how: str) -> None:
    first = prepare(config, tmp_path / "out")
    (path,) = (tmp_path / "out").glob(damage)
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        half = len(content) // 2
        path.write_bytes(content[:half] if how == "torn" else content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    second = prepare(config, tmp_path / "out")
    second.shards[0].verify()
    assert second.shards[0].checksum == first.shards[0].checksum
    assert (second.validation, second.facts) == (first.validation, first.facts)


def test_a_crash_while_preparing_is_repaired_by_running_again(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config, tmp_path / "whole")
    for step in ("write_shard", "_facts", "_replace"):
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, step, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(config, tmp_path / step)
        assert prepare(config, tmp_path / step).shards[0].checksum == whole.shards[0].checksum


def test_sources_are_mixed_by_weight(config: DataConfig, corpus: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"body": f"record {n} " * 8}) for n in range(50)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    both = replace(config, sources=(*config.sources, SourceConfig(path=str(tmp_path / "records.jsonl"), text_key="body", weight=3.0)))
    prepared = prepare(both, tmp_path / "out")
    assert [source["documents"] for source in prepared.facts["sources"]] == [60, 50]
    with closing(prepared.train_loader()) as loader:
        for _ in range(100):
            loader.next_batch()
        drawn = loader.state_dict()["drawn"]
    assert sum(drawn) == 400
    assert abs(drawn[1] / 400 - 0.75) < 0.1


def test_an_existing_tokenizer_is_used_as_it_is(
    config: DataConfig, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path / "mine")
    config = replace(config, tokenizer=str(tmp_path / "mine"), vocab_size=99_999)
    assert prepare(config, tmp_path / "out").tokenizer.fingerprint() == tokenizer.fingerprint()
    no_work(monkeypatch)
    prepare(config, tmp_path / "out")


def test_a_large_corpus_trains_the_tokenizer_on_a_sample(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config, tmp_path / "whole")
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", whole.facts["training"]["bytes"] // 2)
    sampled = [prepare(config, tmp_path / name) for name in ("one", "two")]
    assert sampled[0].tokenizer.fingerprint() == sampled[1].tokenizer.fingerprint() != whole.tokenizer.fingerprint()


def test_a_vocabulary_beyond_the_text_is_refused_with_the_size_that_it_supports(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"supports a vocabulary of \d+ tokens, 60000 were asked for; set data\.vocab_size to at most"):
        prepare(replace(config, vocab_size=60_000), tmp_path / "out")
    with pytest.raises(ConfigError, match="at least 259"):
        prepare(replace(config, vocab_size=100), tmp_path / "out")


def test_the_standard_library_says_which_python_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr("byrote.data.corpus.stdlib_files", lambda: sorted(Path(json.__file__).parent.glob("*.py")))
    tokenizer.save(tmp_path / "mine")
    config = DataConfig(sources=(SourceConfig(path="python-stdlib"),), tokenizer=str(tmp_path / "mine"))
    prepared = prepare(config, tmp_path / "out")
    assert prepared.facts["python"]["num_files"] == prepared.facts["sources"][0]["documents"]
    assert all(document.name.startswith("json/") for document in prepared.validation)
