"""What an evaluation asks of a language model, and two that answer: byrote's own, and any causal model of transformers.

One question is enough for tests of exact answers: *what would greedy decoding say at each of the last n places, given all that
stands before it?* If it says the right token everywhere, greedy decoding from the question on would have written exactly this
answer: its first token is right, so the second is decoded after the same text as here, and so on. One forward pass over question and
answer therefore decides what n decoding steps would (tests/eval/test_harness.py holds the two against each other).

Shapes: B texts, T tokens, N last tokens.
"""

import inspect
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from byrote.device import pick_device
from byrote.errors import ConfigError, DataError
from byrote.model.transformer import Model
from byrote.tokenizer.bpe import Tokenizer

IGNORE = -100


class LanguageModel(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def begin(self) -> tuple[int, ...]:
        """What a text starts with."""
        ...

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""
        ...

    def greedy(self, tokens_BT: Tensor, last: int) -> Tensor:
        """[B, N]: the most probable token at each of the `last` last places, given the text before it."""
        ...


class ByroteLM:
    """A model of ours, in the precision its weights have."""

    def __init__(self, name: str, model: Model, tokenizer: Tokenizer) -> None:
        self.name, self.begin = name, (tokenizer.begin_id,)
        self._model, self._tokenizer = model.eval(), tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    @torch.no_grad()
    def greedy(self, tokens_BT: Tensor, last: int) -> Tensor:
        tokens_BT = tokens_BT.to(self._model.embed.weight.device)
        unscored_BT = torch.full_like(tokens_BT[:, :-1], IGNORE)  # targets keep the head from writing logits of the whole text
        hidden_BTD = self._model(tokens_BT[:, :-1], targets_BT=unscored_BT, want=("hidden",)).extras["hidden"]
        return self._model.head(hidden_BTD[:, -last:]).argmax(-1).cpu()


class TransformersLM:
    """Any causal model of transformers. Of its logits only those of the last places are asked for, where it offers that."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        begin = tokenizer.bos_token_id
        self.name, self.begin = name, () if begin is None else (begin,)
        self._model, self._tokenizer = model.eval(), tokenizer
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def greedy(self, tokens_BT: Tensor, last: int) -> Tensor:
        options = {"logits_to_keep": last} if self._keeps_last else {}
        logits = self._model(input_ids=tokens_BT[:, :-1].to(self._model.device), use_cache=False, **options).logits
        return logits[:, -last:].argmax(-1).cpu()


def load_transformers(folder: str, device: str) -> TransformersLM:
    """Model and tokenizer of a folder in Hugging Face's layout; only safetensors are read, no code of the folder is run.

    Raises ConfigError where transformers is missing, DataError for a folder it cannot load.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ConfigError('--hf needs transformers: pip install "byrote[hf]"') from None
    if not (Path(folder) / "config.json").is_file():
        raise DataError(f"{folder} holds no config.json; give the folder of a model in Hugging Face's layout (weights in safetensors)")
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **safe)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"transformers cannot load {folder}: {error}") from error
    return TransformersLM(folder, model.to(pick_device(device)), tokenizer)
