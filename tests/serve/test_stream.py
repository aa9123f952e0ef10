"""Events as OpenAI's objects: reasoning split out wherever the tokens cut a tag, log-probabilities with their offsets, usage."""

import itertools
import json
import math

import pytest

from byrote.engine.request import TextStream
from byrote.serve.stream import ChatChoice, TextChoice, Thinking, server_sent, text_logprobs, usage_fields


class Letters:
    """Token n is the byte n."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def token(id_: int, logprob: float | None = -1.0, top: tuple = (), gate: float | None = None) -> dict:
    return {"id": id_, "logprob": logprob, "top": top, "gate": gate}


def event(text: str = "", *, finish: str | None = None, tokens: tuple = (), prompt: tuple = ()) -> dict:
    return {"text": text, "finish": finish, "tokens": list(tokens), "prompt": list(prompt)}


def split_in(pieces: list[str]) -> tuple[str, str]:
    thinking = Thinking()
    parts = [*(thinking.push(piece) for piece in pieces), thinking.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>why</think>so", "why", "so"),
        ("no tag", "", "no tag"),
        ("a <think>late</think>", "", "a <think>late</think>"),
        ("<think>never closed </th", "never closed </th", ""),
        ("<thin air", "", "<thin air"),
        ("<think></think>", "", ""),
        ("<think>a</think>b</think>", "a", "b</think>"),
        ("", "", ""),
        ("<", "", "<"),
    ],
)
def test_reasoning_is_split_out_wherever_the_text_is_cut(text: str, reasoning: str, content: str) -> None:
    for first, second in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        assert split_in([text[:first], text[first:second], text[second:]]) == (reasoning, content)
    assert split_in(list(text)) == (reasoning, content)


def test_a_chat_stream_adds_up_to_the_whole_answer() -> None:
    pieces = ["<thi", "nk>hm", "</think", ">yes", " it is"]
    choice = ChatChoice(0, Letters(), logprobs=False, gates=False)
    deltas = [choice.chunk(event(piece, finish="stop" if piece == " it is" else None))["delta"] for piece in pieces]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    message = choice.whole()["message"]
    assert message["reasoning_content"] == "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert message["content"] == "".join(delta.get("content", "") for delta in deltas) == "yes it is"


def test_offsets_of_a_streamed_completion_go_on_where_the_last_chunk_ended() -> None:
    choice = TextChoice(0, Letters(), logprobs=True, gates=False, echo="ab")
    first = choice.chunk(event("c", tokens=(token(99),), prompt=(token(97, None), token(98))))
    second = choice.chunk(event("d", finish="length", tokens=(token(100),)))
    assert (first["text"], second["text"]) == ("abc", "d")
    assert first["logprobs"]["text_offset"] + second["logprobs"]["text_offset"] == [0, 1, 2, 3]
    whole = choice.whole()
    assert (whole["text"], whole["finish_reason"]) == ("abcd", "length")
    assert whole["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert whole["logprobs"]["token_logprobs"] == [None, -1.0, -1.0, -1.0]


def test_log_probabilities_are_json_even_for_tokens_that_cannot_come_and_bytes_that_are_no_text() -> None:
    fields = text_logprobs(Letters(), [token(0xC3, -math.inf, top=((97, -0.5), (98, -math.inf)))], 0)
    assert fields["tokens"] == ["bytes:\\xc3"]
    assert fields["token_logprobs"] == [-9999.0]
    assert fields["top_logprobs"] == [{"a": -0.5, "b": -9999.0}]
    json.dumps(fields, allow_nan=False)


def test_each_prompt_counts_once_however_many_choices() -> None:
    one = {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 2}
    other = {"prompt_tokens": 9, "completion_tokens": 1, "cached_tokens": 4}
    fields = usage_fields({3: other, 0: one, 1: one | {"completion_tokens": 5}, 2: other}, 2)
    assert (fields["prompt_tokens"], fields["completion_tokens"], fields["total_tokens"]) == (16, 10, 26)
    assert fields["prompt_tokens_details"] == {"cached_tokens": 6}


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 4], [3, 3]], ids=str)
def test_gates_stand_at_whole_characters(chunks: list[int]) -> None:
    tokens = [token(byte, gate=gate) for byte, gate in zip("né€".encode(), (0.1, 0.2, 0.4, 0.3, 0.6, 0.9))]
    choice, shown = TextChoice(0, Letters(), logprobs=False, gates=True), []
    for count in chunks:
        part, tokens = tokens[:count], tokens[count:]
        shown += choice.chunk(event(finish=None if tokens else "length", tokens=tuple(part)))["gates"]
    assert [one["token"] for one in shown] == ["n", "é", "€"]
    assert [one["gate"] for one in shown] == pytest.approx([0.1, 0.3, 0.6])
    assert choice.whole()["gates"] == shown


def test_a_character_that_is_never_completed_still_has_its_gate() -> None:
    choice = TextChoice(0, Letters(), logprobs=False, gates=True)
    shown = choice.chunk(event(finish="length", tokens=(token(97, gate=0.5), token(0xC3, gate=0.25))))["gates"]
    assert shown == [{"token": "a", "gate": 0.5}, {"token": "\ufffd", "gate": 0.25}]


def test_bytes_that_are_no_text_come_with_their_gates_as_they_come_in_the_text() -> None:
    choice, stream = TextChoice(0, Letters(), logprobs=False, gates=True), TextStream(Letters())
    for byte, gate in ((0x6E, 0.5), (0xC3, 0.1), (0xC3, 0.2), (0xE2, 0.3), (0x82, 0.4), (0x48, 0.8)):
        shown = choice.chunk(event(tokens=(token(byte, gate=gate),)))["gates"]
        assert "".join(one["token"] for one in shown) == stream.push(byte)
    assert [one["gate"] for one in choice.whole()["gates"]] == pytest.approx([0.5, 0.15, 0.25, (0.3 + 0.4 + 0.8) / 3])


def test_a_server_sent_event_is_one_line_whatever_the_text() -> None:
    text = "a\n\ndata: b\r\x0b\x1c\x85\u2028\u2029é"
    sent = server_sent({"text": text})
    assert sent.decode().splitlines() == [sent[:-2].decode(), ""]
    assert json.loads(sent[len(b"data: ") :]) == {"text": text}


def test_an_id_beyond_the_vocabulary_has_no_text(tokenizer) -> None:
    """Models round the number of their tokens up, and may say one that the tokenizer has not."""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert text_logprobs(tokenizer, [token(tokenizer.vocab_size)], 0)["tokens"] == [""]
