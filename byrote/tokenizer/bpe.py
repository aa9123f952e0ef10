"""Byte-level byte-pair encoding: training it, and using any tokenizer of that family. The work is done by `tokenizers`.

Text is first cut into pieces by `PIECES`; inside a piece, pairs of neighbours merge in the order learnt from the corpus; nothing
merges across pieces. Every byte is a token of its own, so any text can be written and comes back exactly.

What may become one token is decided by the cut, which is made for source code as much as for prose:

    for␣item␣in␣rows:⏎␣␣␣␣print(item,␣1000)     →  for│␣item│␣in│␣rows│:⏎␣␣␣␣│print│(item│,␣│100│0│)

  - a word takes one character before it along: the space, the dot of a method, a bracket, an underscore;
  - a run of punctuation takes the white space behind it along: the end of a statement, the newline and the indentation of the
    next line can be one token;
  - digits go in groups of up to three;
  - blank lines with the indentation after them are one piece, and so are the spaces before a comment.

Special tokens stand for no bytes, and text never turns into one: "<|end|>" in a document is encoded like any other characters.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from byrote.config import nearest
from byrote.errors import ConfigError, DataError

BEGIN, END, PAD = SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>")
PIECES = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word and one character before it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*(?=\S)",  # punctuation, the end of the line and the next indentation
        r"[\r\n]+[ \t]*",
        r" ?[^\s\p{L}\p{N}]+",
        r"[ \t]+(?=[ \t]\S)",  # leaves one space for the word behind
        r"\s+",
    )
)
NUM_BYTES = 256
LEAST_COUNT = 2  # a pair seen once teaches nothing
TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
LONGEST_TEXT = 1 << 20  # characters encoded in one piece: longer texts are cut after a newline, to bound memory


class Tokenizer:
    """A byte-level BPE tokenizer: text ⇄ ids. `begin_id`, `end_id` and `pad_id` are ids of special tokens."""

    def __init__(self, engine: Engine, special_tokens: tuple[str, str, str] = SPECIAL_TOKENS, chat_template: str | None = None) -> None:
        if not isinstance(engine.model, models.BPE) or "ByteLevel" not in json.dumps(_part(engine, "decoder")):
            raise DataError("the tokenizer is not a byte-level BPE, which byrote needs to know the exact bytes of every token")
        engine.encode_special_tokens = True  # characters that look like a special token are just characters
        self._engine = engine
        self.special_tokens = special_tokens
        self.chat_template = chat_template  # Jinja; None: a base model's tokenizer (`tokenizer/chat.py`)
        self.begin_id, self.end_id, self.pad_id = (_special_id(engine, token) for token in special_tokens)

    @property
    def vocab_size(self) -> int:
        return self._engine.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without begin and end."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        pieces = [list(cut_long(text)) for text in texts]
        encoded = iter(self._engine.encode_batch_fast([piece for some in pieces for piece in some], add_special_tokens=False))
        return [[token for _ in some for token in next(encoded).ids] for some in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens have none; bytes that are no whole character show as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def decode_one(self, token: int) -> str:
        """The text of one id by itself, a special token as it is written."""
        return self.token_strings()[token] if token in self._special else self.decode([token])

    def token_bytes(self, token: int) -> bytes:
        """Exactly the bytes this token stands for: none for a special token, or an id beyond the last (models round their number up)."""
        return self._bytes_of[token] if token < len(self._bytes_of) else b""

    def token_strings(self) -> list[str]:
        """The vocabulary's own spelling of every id, in which each byte is one printable character."""
        return list(self._strings)

    def special_ids(self) -> dict[str, int]:
        """Every special token, as it is written, and its id."""
        return {self._strings[token]: token for token in sorted(self._special)}

    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets. The same for a tokenizer saved by another version of the library."""
        facts = json.loads(self._engine.to_str())
        model = facts["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        added = [(token["id"], token["content"], token["special"]) for token in facts["added_tokens"]]
        parts = (model["vocab"], merges, added, facts["normalizer"], facts["pre_tokenizer"], self.special_tokens)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files that `load`, and transformers' `AutoTokenizer`, read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        begin, end, pad = self.special_tokens
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**18,  # no limit of its own
        } | ({} if self.chat_template is None else {"chat_template": self.chat_template})
        _replace(folder / TOKENIZER_FILE, self._engine.to_str(pretty=True))
        _replace(folder / CONFIG_FILE, json.dumps(config, indent=2))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read a folder with tokenizer.json and tokenizer_config.json, ours or of any byte-level BPE model. Raises DataError."""
        folder = Path(folder).expanduser()
        config = _read_json(folder / CONFIG_FILE)
        engine = _read_engine(folder / TOKENIZER_FILE)
        engine.no_padding()
        engine.no_truncation()
        return cls(engine, _special_tokens(config, folder / CONFIG_FILE), _chat_template(config, folder))

    @functools.cached_property
    def _strings(self) -> list[str]:
        return [self._engine.id_to_token(token) or "" for token in range(self.vocab_size)]

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        marked = {token for token, added in self._engine.get_added_tokens_decoder().items() if added.special}
        return frozenset(marked | {self.begin_id, self.end_id, self.pad_id})

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        plain = self._engine.get_added_tokens_decoder().keys()  # written as they are, not in the byte alphabet
        byte_of = _byte_alphabet()
        spelled = (
            string.encode("utf-8") if token in plain else bytes(byte_of[character] for character in string)
            for token, string in enumerate(self._strings)
        )
        return [b"" if token in self._special else content for token, content in enumerate(spelled)]


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: tuple[str, str, str] = SPECIAL_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Learn a vocabulary of exactly `vocab_size` tokens. `progress` is told the number of characters read.

    Raises ConfigError if the size has no room for the 256 bytes, DataError if the text does not hold that many merges.
    """
    least = NUM_BYTES + len(special_tokens)
    if vocab_size < least:
        raise ConfigError(f"vocab_size is {vocab_size}; it must be at least {least} (256 bytes and {len(special_tokens)} special tokens)")
    engine = Engine(models.BPE())
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST_COUNT,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(_reported(texts, progress), trainer)
    reached = engine.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"the text supports a vocabulary of {reached} tokens, {vocab_size} were asked for; "
            f"set data.vocab_size to at most {reached} or give more text"
        )
    return Tokenizer(engine, special_tokens)


def cut_long(text: str) -> Iterator[str]:
    """`text` in parts of at most LONGEST_TEXT characters, cut after a newline where there is one."""
    start = 0
    while len(text) - start > LONGEST_TEXT:
        end = text.rfind("\n", start, start + LONGEST_TEXT) + 1 or start + LONGEST_TEXT
        yield text[start:end]
        start = end
    yield text[start:]


def _reported(texts: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    read = 0
    for text in texts:
        for part in cut_long(text):
            yield part
            read += len(part)
            if progress is not None:
                progress(read)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte → the byte.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 onward.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _part(engine: Engine, name: str) -> Any:
    return json.loads(engine.to_str())[name]


def _special_id(engine: Engine, token: str) -> int:
    found = engine.token_to_id(token)
    if found is None:
        raise DataError(f"the tokenizer's vocabulary has no {token!r}, which its configuration names as a special token")
    return found


def _special_tokens(config: dict[str, Any], file: Path) -> tuple[str, str, str]:
    """(begin, end, pad) by the names transformers uses; a model without begin or padding uses its end token for them."""
    found = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    end = found["eos_token"]
    if end is None:
        raise DataError(f"{file} names no eos_token (its keys: {', '.join(config)}); add the token that ends a document")
    return found["bos_token"] or end, end, found["pad_token"] or end


def _chat_template(config: dict[str, Any], folder: Path) -> str | None:
    """From its own file, as transformers writes it now, or from the configuration; of several the one named "default"."""
    if (folder / TEMPLATE_FILE).is_file():
        return _read(folder / TEMPLATE_FILE)
    given = config.get("chat_template")
    if isinstance(given, list):
        given = {one["name"]: one["template"] for one in given}.get("default")
    return given


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(_read(file))
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}; save the tokenizer again") from None


def _read_engine(file: Path) -> Engine:
    content = _read(file)
    try:
        return Engine.from_str(content)
    except Exception as error:  # the library's only type, for any content it cannot use
        raise DataError(f"{file} is no tokenizer that the installed `tokenizers` can read: {error}") from None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{file} is damaged: it is not UTF-8; save the tokenizer again") from None
    except OSError as error:
        there = os.listdir(file.parent) if file.parent.is_dir() else []
        hint = f"; the nearest name there is {nearest(file.name, there)}" if there else ""
        raise DataError(f"{file} cannot be read ({error.strerror}); give a folder with {TOKENIZER_FILE} and {CONFIG_FILE}{hint}") from None


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(file.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
