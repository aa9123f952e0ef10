"""Messages → the ids of a prompt, by the chat template that comes with a tokenizer (Jinja, as transformers writes it).

    [{"role": "user", "content": "Hi"}]  ──template──▶  <|begin|><|user|>Hi<|assistant|>  ──▶  ids

A base model has no template and only continues text; asking it to chat says so.

Special tokens of the template become their ids; what looks like one in a message stays text. For that, every such string in a message
is exchanged for a marker that no text holds while the template is rendered, and put back when the parts between special tokens
are encoded. So the template may cut, trim and join as it likes, and nobody can end their message by writing the end token.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from byrote.errors import RequestError
from byrote.tokenizer.bpe import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatTemplate:
    """The template of one tokenizer, made by `of`."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._ids = tokenizer.special_ids()
        self._special = re.compile("(" + "|".join(re.escape(text) for text in sorted(self._ids, key=len, reverse=True)) + ")")
        self._nonce = f"\ue000{secrets.token_hex(8)}:"
        self._markers = {text: f"{self._nonce}{number}\ue001" for number, text in enumerate(self._ids)}
        self._texts = {marker: text for text, marker in self._markers.items()}
        self._marker = re.compile(re.escape(self._nonce) + r"\d+\ue001")

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """None for a base model's tokenizer, which has none. Raises RequestError for a template that is no Jinja."""
        if tokenizer.chat_template is None:
            return None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _refuse
        try:
            return cls(tokenizer, environment.from_string(tokenizer.chat_template))
        except TemplateError as error:
            raise RequestError(f"the tokenizer's chat template cannot be used: {error}; correct it, or use completions") from error

    def encode(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation. With `add_generation_prompt` it ends where the assistant's answer begins."""
        ids: list[int] = []
        for part in self._special.split(self._render(messages, add_generation_prompt)):
            text = self._marker.sub(lambda match: self._texts[match[0]], part)
            ids += [self._ids[part]] if part in self._ids else self._tokenizer.encode(text)
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The conversation as the template writes it, with markers for what looks like a special token and is none."""
        if not messages:
            raise RequestError("there are no messages; give at least one of the user")
        begin, end, pad = self._tokenizer.special_tokens
        facts: dict[str, Any] = {"bos_token": begin, "eos_token": end, "pad_token": pad, "add_generation_prompt": add_generation_prompt}
        hidden = [self._hide(message, number) for number, message in enumerate(messages)]
        try:
            return self._template.render(messages=hidden, **facts)
        except TemplateError as error:
            raise RequestError(f"the chat template cannot write these messages: {error}") from error

    def _hide(self, message: Mapping[str, str], number: int) -> dict[str, str]:
        """A checked copy whose texts hold no special token."""
        if message.get("role") not in ROLES:
            raise RequestError(f"message {number} has role {message.get('role')!r}; allowed: {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RequestError(f"message {number} has no text: content is {message.get('content')!r}; give a string")
        return {key: self._special.sub(lambda match: self._markers[match[0]], text) for key, text in message.items()}


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The template, or a RequestError that says what a base model is for."""
    template = ChatTemplate.of(tokenizer)
    if template is None:
        raise RequestError("this model has no chat template: it is a base model, which continues text. Use completions (`byrote generate`)")
    return template


def _refuse(message: str) -> NoReturn:
    raise RequestError(f"the chat template refuses these messages: {message}")
