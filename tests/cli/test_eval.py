"""`byrote eval` with a stand-in for the scoring: what it reads, refuses and prints."""

import json
import lzma

import pytest

import byrote
from byrote.cli.main import main
from byrote.eval import bits

MODEL, TOKENIZER = object(), object()


@pytest.fixture
def scored(monkeypatch):
    """Every byte costs two bits. Holds what the scoring was asked for."""
    asked = {}

    def bits_per_byte(model, tokenizer, texts, **options):
        assert (model, tokenizer) == (MODEL, TOKENIZER)
        options.pop("progress")(1, 1)
        asked.update(options, texts=texts)
        sizes = [(name, len(text.encode())) for name, text in texts]
        return bits.BitsResult(2.0, [bits.TextBits(name, size, 2.0 * size) for name, size in sizes], tokens=7, seconds=0.5)

    monkeypatch.setattr(bits, "bits_per_byte", bits_per_byte)
    monkeypatch.setitem(vars(byrote), "load", lambda path, **how: asked.update(how) or (MODEL, TOKENIZER))
    return asked


@pytest.fixture
def files(tmp_path):
    contents = {"a.txt": "one line\r\n" * 9, "b.txt": "café " * 31}
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode())
    return {str(tmp_path / name): text for name, text in contents.items()}


def test_files_are_scored_byte_for_byte_beside_xz(capsys, scored, files):
    argv = ["eval", "runs/x", "--bits", *files, "--context", "99", "--stride", "9", "--device", "cpu", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert dict(scored["texts"]) == files
    assert (scored["context"], scored["stride"], scored["device"]) == (99, 9, "cpu")
    for row, text in zip(result["files"], files.values(), strict=True):
        assert row["bytes"] == len(text.encode())
        assert row["bits_per_byte"] == 2.0
        assert row["xz_bits_per_byte"] == 8 * len(lzma.compress(text.encode(), preset=9)) / len(text.encode())
    together = "".join(files.values()).encode()
    assert result["total"]["xz_bits_per_byte"] == 8 * len(lzma.compress(together, preset=9)) / len(together)
    assert result["total"]["ratio"] == pytest.approx(2.0 / result["total"]["xz_bits_per_byte"])


def test_the_table_has_a_line_a_file_a_total_and_the_number_of_seeds(capsys, scored, files):
    assert main(["eval", "runs/x", "--bits", *files]) == 0
    shown = capsys.readouterr().out
    for text in (*files, "total", "xz -9", "one seed", "context 1024, stride 512"):
        assert text in shown


def test_one_file_needs_no_total(capsys, scored, files):
    main(["eval", "runs/x", "--bits", next(iter(files))])
    assert "\ntotal" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"ab\xff\x00", "is no UTF-8 text (byte 2 is 0xff)"),
        (None, "cannot be read: No such file"),
        ("folder", "is a folder"),
    ],
)
def test_what_is_no_text_is_named_before_anything_is_loaded(capsys, monkeypatch, tmp_path, content, expected):
    monkeypatch.setitem(vars(byrote), "load", lambda path, **_: pytest.fail("loaded"))
    path = tmp_path / "odd"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert main(["eval", "runs/x", "--bits", str(path)]) == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert expected in message


def test_with_int8_the_loss_stands_beside_what_the_saved_weights_need(capsys, scored, monkeypatch, files):
    plain, asked = bits.bits_per_byte, []
    monkeypatch.setitem(vars(byrote), "load", lambda path, device, weights: asked.append(weights) or (MODEL, TOKENIZER))

    def dearer(*given, **options):
        found = plain(*given, **options)
        more = 0.25 * (len(asked) - 1)
        return found._replace(
            bits_per_byte=2 + more, per_text=[one._replace(bits=one.bits + more * one.num_bytes) for one in found.per_text]
        )

    monkeypatch.setattr(bits, "bits_per_byte", dearer)
    assert main(["eval", "runs/x", "--bits", *files, "--weights", "int8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert asked == ["saved", "int8"]
    for row in (*result["files"], result["total"]):
        assert (row["bits_per_byte"], row["int8_bits_per_byte"], row["int8_loss"]) == (2.0, 2.25, 0.25)
    asked.clear()
    main(["eval", "runs/x", "--bits", *files, "--weights", "int8"])
    shown = capsys.readouterr().out
    assert "with int8" in shown and "+0.2500" in shown


def test_int8_weights_of_a_hugging_face_model_are_refused_and_not_ignored(capsys):
    assert main(["eval", "--hf", "folder", "--needle", "--weights", "int8"]) == 2
    assert "--weights int8 is for runs" in capsys.readouterr().err
