"""Building C kernels: at first use, in the cache, and never in the way of who cannot build."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byrote.errors import ConfigError
from byrote.kernels import native

ADD = {"add": [ctypes.c_int, ctypes.c_int]}


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has built nothing yet, with an empty cache of its own."""
    monkeypatch.setattr(native, "_outcomes", {})
    monkeypatch.setenv("BYROTE_CACHE", str(tmp_path / "cache"))
    native._toolchains.cache_clear()
    yield tmp_path / "cache"
    native._toolchains.cache_clear()


@pytest.fixture
def need_compiler(fresh):
    if not native._toolchains():
        pytest.skip("no C compiler here")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "add.c"
    path.write_text("int add(int a, int b) { return a + b; }\n")
    return path


def built(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.usefixtures("need_compiler")
def test_a_library_is_built_once_and_found_again(fresh, source, monkeypatch):
    library = native.load("add", [source], ADD)
    assert library is not None
    assert library.add(2, 3) == 5
    assert native.load("add", [source], ADD) is library
    (file,) = built(fresh)
    assert file.startswith("add-") and file.endswith(".so")

    monkeypatch.setattr(native, "_outcomes", {})  # the next process
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("built although it lies in the cache"))
    again = native.load("add", [source], ADD)
    assert again is not None
    assert again.add(20, 3) == 23


@pytest.mark.usefixtures("need_compiler")
def test_another_source_header_or_processor_is_another_file(fresh, source, monkeypatch):
    header = source.with_suffix(".h")
    header.write_text("")
    for text, processor in (("", "this"), ("/* changed */", "this"), ("/* changed */", "that")):
        header.write_text(text)
        monkeypatch.setattr(native, "_processor", lambda processor=processor: processor)
        monkeypatch.setattr(native, "_outcomes", {})
        assert native.load("add", [source, header], ADD) is not None
    assert len(built(fresh)) == 3


@pytest.mark.usefixtures("need_compiler")
def test_a_source_that_does_not_compile_leaves_the_reason_and_no_file(fresh, source):
    source.write_text("int add(int a, int b) { return a + ; }\n")
    assert native.load("add", [source], ADD) is None
    assert "expected" in native._outcomes["add"].reason
    assert built(fresh) == []


@pytest.mark.usefixtures("need_compiler")
@pytest.mark.parametrize("kind", ["a file", "a link to nowhere"])
def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(fresh, source, kind):
    if kind == "a file":
        fresh.write_text("in the way")
    else:
        fresh.symlink_to(fresh / "itself")
    library = native.load("add", [source], ADD)
    assert library is not None
    assert library.add(1, 1) == 2
    path = native._outcomes["add"].path
    assert path is not None
    assert path.is_relative_to(native._private_folder())


@pytest.mark.usefixtures("need_compiler")
def test_a_damaged_library_in_the_cache_is_not_fatal(fresh, source, monkeypatch):
    assert native.load("add", [source], ADD) is not None
    (file,) = fresh.iterdir()
    file.unlink()  # the open one lives on
    file.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_outcomes", {})
    library = native.load("add", [source], ADD)
    assert library is not None
    assert library.add(2, 2) == 4


def test_without_a_compiler_the_reason_says_what_to_install(fresh, source, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert native.load("add", [source], ADD) is None
    status = native.status()
    assert status["active"] is False
    assert "no C compiler" in str(status["reason"]) and "install" in str(status["reason"])


@pytest.mark.usefixtures("need_compiler")
def test_a_compiler_that_is_none_is_passed_over(source, monkeypatch):
    monkeypatch.setenv("CC", "false")
    library = native.load("add", [source], ADD)
    assert library is not None
    assert library.add(2, 2) == 4


def test_switched_off_means_off(fresh, source, monkeypatch):
    monkeypatch.setenv("BYROTE_NATIVE", "0")
    assert native.load("add", [source], ADD) is None
    assert native.status() == {"active": False, "reason": "switched off by BYROTE_NATIVE=0"}
    assert not fresh.exists()


def test_a_setting_that_means_nothing_is_refused(source, monkeypatch):
    monkeypatch.setenv("BYROTE_NATIVE", "yes")
    with pytest.raises(ConfigError, match=r"'yes'; allowed: 1 .* or 0"):
        native.load("add", [source], ADD)


@pytest.mark.usefixtures("need_compiler")
def test_status_tells_compiler_flags_threads_and_files(fresh):
    status = native.status()
    assert status["active"] is True
    assert "-O3" in str(status["flags"])
    assert status["threads"] == (1 if status["openmp"] == "off" else torch.get_num_threads())
    assert [str(fresh / file) for file in built(fresh)] == list(dict(status["libraries"]).values())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list what a process has mapped")
def test_only_pytorchs_own_openmp_runs_in_the_process():
    program = """
import torch
from byrote.kernels import native
torch.ones(1 << 20).add_(1)
before = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
assert native.status()["active"]
after = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
print(sorted(after - before))
"""
    if not native.status()["active"]:
        pytest.skip("no native kernels here")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(native.__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.usefixtures("need_compiler")
def test_two_processes_building_at_once_both_succeed(fresh, source):
    program = (
        "import ctypes, sys; from pathlib import Path; from byrote.kernels import native;"
        "print(native.load('add', [Path(sys.argv[1])], {'add': [ctypes.c_int] * 2}).add(2, 3))"
    )
    root, environment = Path(native.__file__).parents[2], os.environ | {"BYROTE_CACHE": str(fresh)}
    racers = [
        subprocess.Popen([sys.executable, "-c", program, str(source)], stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
        for _ in range(2)
    ]
    assert [racer.communicate()[0].strip() for racer in racers] == ["5", "5"]
    assert len(built(fresh)) == 1


def test_a_tensor_with_gaps_has_no_address():
    with pytest.raises(AssertionError, match="contiguous"):
        native.address(torch.zeros(4, 4).t()[1:])
    assert native.address(None) is None


def test_a_kernel_out_of_memory_says_so():
    native.check(0)
    with pytest.raises(MemoryError, match="BYROTE_NATIVE=0"):
        native.check(1)
