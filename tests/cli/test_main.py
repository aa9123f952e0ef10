"""The command line as a whole: verbs, errors, exit statuses, and how little it imports."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from byrote.cli import main as command
from byrote.cli.main import VERBS, main, verbs
from byrote.errors import DataError


@pytest.fixture
def verb(monkeypatch):
    """A verb `act` whose `run` is up to the test."""
    module = ModuleType("acting")
    module.HELP = "act for a test"
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int)
    module.run = lambda args: 0
    monkeypatch.setattr(command, "VERBS", {"act": "acting", "missing": "byrote.cli.no_such_module"})
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda path: path if path == "acting" else None)
    monkeypatch.setitem(sys.modules, "acting", module)
    return module


def test_help_lists_the_verbs_that_are_there_and_imports_no_torch():
    script = "import sys; from byrote.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules and 'torch was imported')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert not done.stderr
    for name in verbs():
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", verbs())
def test_every_verb_explains_itself(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"usage: byrote {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "generate", "eval", "compare"])
def test_help_carries_an_example_that_begins_with_the_command(name, capsys):
    main([name, "--help"])
    assert f"\n  byrote {name} " in capsys.readouterr().out


def test_without_arguments_the_overview_is_shown(capsys, verb):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "act for a test" in shown
    assert "missing" not in shown, "a verb whose module is absent is not offered"


def test_the_status_of_a_verb_is_the_status_of_the_command(verb):
    verb.run = lambda args: args.number
    assert main(["act", "--number", "7"]) == 7


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["atc"], "unknown verb 'atc'; nearest verb: act"),
        (["missing"], "unknown verb 'missing'; nearest verb: act"),
        (["--numbers"], "unknown option '--numbers'"),
        (["act", "--numbr", "3"], "unknown option --numbr; nearest: --number. See `byrote act --help`"),
        (["act", "--num=3"], "unknown option --num; nearest: --number"),
        (["act", "more"], "unexpected argument: more"),
        (["act", "--number", "x"], "argument --number: invalid int value: 'x'"),
    ],
)
def test_what_cannot_be_parsed_is_one_message_on_stderr_and_status_2(argv, expected, capsys, verb):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("byrote: ")
    assert expected in captured.err
    assert "Traceback" not in captured.err


def failing(error: BaseException):
    def run(args: SimpleNamespace) -> int:
        raise error

    return run


def test_an_error_of_the_tree_is_its_message_and_its_trace_only_on_request(capsys, verb):
    verb.run = failing(DataError("the text is missing. Give some"))
    assert main(["act"]) == 2
    assert capsys.readouterr().err == "byrote: the text is missing. Give some\n"
    for argv in (["--traceback", "act"], ["act", "--traceback"]):
        assert main(argv) == 2
        shown = capsys.readouterr().err
        assert "Traceback" in shown
        assert shown.endswith("byrote: the text is missing. Give some\n")


def test_an_interruption_is_short_and_has_the_status_of_a_signal(capsys, verb):
    verb.run = failing(KeyboardInterrupt())
    assert main(["act"]) == 130
    assert capsys.readouterr().err == "\nbyrote: interrupted\n"


def test_an_error_that_is_not_ours_is_not_swallowed(verb):
    verb.run = failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["act"])


def test_a_reader_that_goes_away_is_no_crash():
    script = "import sys; from byrote.cli.main import main\nfor _ in range(999): status = main(['--help'])\nsys.exit(status)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        complaint = process.stderr.read().decode()
        process.wait()
    assert "Traceback" not in complaint


def test_every_listed_verb_has_its_three_parts():
    for path in verbs().values():
        module = command.importlib.import_module(path)
        assert module.HELP
        assert callable(module.add_arguments)
        assert callable(module.run)
    assert set(verbs()) <= set(VERBS)
