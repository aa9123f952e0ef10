"""One server for all tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import byrote
from byrote.tokenizer.bpe import Tokenizer, train_bpe
from tests.model.tiny_models import whole
from tests.serve.served import KEY, Served

TEXT = "so it goes and so it goes and the rest is silence. " * 20
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 280)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A base model."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    byrote.save(byrote.Model(whole(vocab_size=tokenizer.vocab_size, max_positions=512)), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """The same with a chat template."""
    model, tokenizer = byrote.load(run, device="cpu")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    byrote.save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def served(chat_run: Path) -> Iterator[Served]:
    server = Served(chat_run, BYROTE_API_KEY=KEY)
    yield server
    assert server.close() == 0, "".join(server.log)
