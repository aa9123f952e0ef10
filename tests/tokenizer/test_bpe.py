"""The tokenizer gives back every text exactly, and opens in other libraries."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from byrote.errors import ConfigError, DataError
from byrote.tokenizer import bpe
from byrote.tokenizer.bpe import Tokenizer, cut_long, train_bpe

CODE = 'def f(x):\n    """Résumé."""\n    if x > 1000:\n        return self.rows[x_1]\n\n\n' * 3 + "# 日本語\n" * 3
TEXTS = [
    CODE,
    "",
    " ",
    "\n\n    \n\t\tx\r\n  y \r",
    "naïve e\u0301 ﬁ Ⅷ ￼ \ufffd \ufeff",
    "👩‍👩‍👧‍👦 🦜 𝔘𝔫𝔦 \U0010ffff",
    "\x00\x01\x7f\x85\xa0\u2028\u200b",
    "<|begin|>x<|end|><|pad|>",
    "1234567890 3.14 0xFF １２ ⅔",
    "trailing spaces   ",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([CODE, CODE], 300)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode("utf-8")
    assert not {tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id} & set(ids)


def test_random_unicode_comes_back_exactly(tokenizer: Tokenizer) -> None:
    choose = random.Random(0)
    for _ in range(200):
        points = (choose.choice((choose.randrange(0x80), choose.randrange(0xD800), choose.randrange(0xE000, 0x110000))) for _ in range(50))
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_each_text_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_every_byte_is_a_token_and_special_tokens_have_none(tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)} >= {bytes([byte]) for byte in range(256)}
    for token, string in zip((tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id), ("<|begin|>", "<|end|>", "<|pad|>"), strict=True):
        assert tokenizer.token_bytes(token) == b""
        assert tokenizer.decode_one(token) == tokenizer.token_strings()[token] == string
    assert tokenizer.decode([tokenizer.begin_id, *tokenizer.encode("x"), tokenizer.end_id]) == "x"


def test_half_a_character_shows_as_the_replacement_character(tokenizer: Tokenizer) -> None:
    first, *_rest = tokenizer.encode("🦜")
    assert tokenizer.decode_one(first) == "\ufffd"
    assert tokenizer.token_bytes(first) == "🦜".encode()[:1]


def test_the_vocabulary_has_the_size_asked_for_and_training_is_deterministic() -> None:
    first, second = (train_bpe(iter([CODE, "other"] * 2), 299) for _ in range(2))
    assert first.vocab_size == len(first.token_strings()) == len(set(first.token_strings())) == 299
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != train_bpe([CODE] * 2, 298).fingerprint()


def test_pieces_keep_the_structure_of_code() -> None:
    cut = pre_tokenizers.Split(bpe.Regex(bpe.PIECES), "isolated")
    cases = {
        "for item in rows:\n    print(item, 1000)": ["for", " item", " in", " rows", ":\n    ", "print", "(item", ", ", "100", "0", ")"],
        "x = y\n\n\n    # note": ["x", " = ", "y", "\n\n\n    ", "# ", "note"],
        "a.append\r\n": ["a", ".append", "\r\n"],
        "x      y": ["x", "     ", " y"],
    }
    for text, pieces in cases.items():
        assert [piece for piece, _ in cut.pre_tokenize_str(text)] == pieces


def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_what_was_reached() -> None:
    with pytest.raises(DataError, match=r"supports a vocabulary of 259 tokens, 1000 were asked for; set data\.vocab_size to at most 259"):
        train_bpe(["abc"], 1000)
    assert train_bpe(["abc"], 259).vocab_size == 259
    with pytest.raises(ConfigError, match="vocab_size is 258; it must be at least 259"):
        train_bpe(["abc"], 258)


def test_progress_counts_characters_of_every_text() -> None:
    seen: list[int] = []
    train_bpe(iter(["abc", "de"]), 259, progress=seen.append)
    assert seen == [3, 5]


def test_an_interrupt_while_training_comes_through() -> None:
    def interrupted(_read: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bpe(["abc"] * 3, 259, progress=interrupted)


def test_long_texts_are_cut_after_newlines_and_joined_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "LONGEST_TEXT", 50)
    text = CODE + "x" * 170 + "\n" + CODE
    parts = list(cut_long(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 50
    assert sum(part.endswith("\n") for part in parts) > len(parts) // 2
    assert tokenizer.encode(text) == [token for part in parts for token in tokenizer.encode(part)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


# --- files ------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (loaded.begin_id, loaded.end_id, loaded.pad_id) == (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id)
    assert loaded.token_strings() == tokenizer.token_strings()


def test_transformers_opens_the_folder_and_agrees(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if "<|" not in text:  # they read special tokens out of text, which ours never does
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id)


def save_engine(engine: Engine, folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def gpt2_like() -> Engine:
    """Byte-level, one special token, a plain added token, truncation left on: as many published tokenizers are."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator([CODE], trainer)
    engine.add_tokens(["é日added"])
    engine.enable_truncation(3)
    engine.enable_padding(length=5)
    return engine


def test_a_published_byte_level_tokenizer_is_used_whole(gpt2_like: Engine, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_engine(gpt2_like, tmp_path, eos_token={"content": "<|endoftext|>"}, bos_token=None))
    assert tokenizer.begin_id == tokenizer.end_id == tokenizer.pad_id == 0
    text = CODE + " é日added " + "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) == "é日added".encode()
    assert 0 not in tokenizer.encode(text)


def test_files_that_cannot_be_used_say_what_to_do(gpt2_like: Engine, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read .* give a folder with tokenizer\.json"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="names no eos_token"):
        Tokenizer.load(save_engine(gpt2_like, tmp_path, bos_token="<|endoftext|>"))
    with pytest.raises(DataError, match="vocabulary has no '<other>'"):
        Tokenizer.load(save_engine(gpt2_like, tmp_path, eos_token="<other>"))
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos')
    with pytest.raises(DataError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_family_is_refused(tmp_path: Path) -> None:
    words = Engine(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(DataError, match="not a byte-level BPE"):
        Tokenizer.load(save_engine(words, tmp_path, eos_token="<unk>"))
