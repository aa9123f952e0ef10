"""The set-up is run here in a sandbox: its own folder, and a PATH that holds a few tools and the interpreters each test invents."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TOOLS = ("cat", "cksum", "dirname", "grep", "ls", "rm", "sh", "make", "echo", "mkdir", "chmod")  # the last three for the tests' own needs
# What `setup.sh` asks of an interpreter: a verdict on itself, and to run install.py, which here only leaves its stamp.
FAKE = """#!/bin/sh
if [ "$1" = -c ]; then {verdict}; exit; fi
echo "{name} $1" >> calls
mkdir -p "$VENV/bin" && : > "$VENV/bin/python" && chmod +x "$VENV/bin/python" && : > "$VENV/pyvenv.cfg"
printf '%s\\n' "$2" "${{FAKE_BUILD:-cpu}}" "$PYTHON" > "$VENV/.setup-done"
"""
WORKS, OLD, SHIM, NO_VENV = "echo works", "echo '3.9, 64 bit'", "echo 'version not selected' >&2; exit 127", "echo no-venv 3.12"


class Sandbox:
    def __init__(self, folder: Path) -> None:
        self.root, self.bin = folder / "byrote", folder / "bin"
        (self.root / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("pyproject.toml", "constraints.txt", "Makefile", "scripts/setup.sh", "scripts/install.py"):
            shutil.copy(ROOT / name, self.root / name)
        for path in filter(None, map(shutil.which, TOOLS)):
            (self.bin / Path(path).name).symlink_to(path)
        self.tool("uname", "echo Linux")

    def tool(self, name: str, line: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.bin / name).chmod(0o755)

    def python(self, name: str, verdict: str) -> None:
        (self.bin / name).write_text(FAKE.format(name=name, verdict=verdict))
        (self.bin / name).chmod(0o755)

    def setup(self, *, release: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        (self.root / "os-release").write_text(release)
        variables = {"PATH": str(self.bin), "OS_RELEASE": "./os-release", **environment}
        return subprocess.run(["sh", "scripts/setup.sh"], cwd=self.root, env=variables, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        """Interpreters that were given install.py, since the last time this was asked."""
        log = self.root / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.removesuffix(" scripts/install.py") for line in lines]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/install.py as a module, for an environment in a temporary folder."""
    monkeypatch.setenv("VENV", str(tmp_path / "env"))
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ({"python3": WORKS, "python3.12": WORKS}, "python3"),
        ({"python3": OLD, "python3.11": WORKS, "python3.14": WORKS}, "python3.11"),
        ({"python3": OLD, "python3.12": SHIM, "python3.13": WORKS}, "python3.13"),
        ({"python3": NO_VENV, "python3.14": WORKS}, "python3.14"),
    ],
)
def test_the_first_interpreter_that_really_works_is_taken(present: dict[str, str], chosen: str, sandbox: Sandbox) -> None:
    for name, verdict in present.items():
        sandbox.python(name, verdict)
    result = sandbox.setup()
    assert result.returncode == 0, result.stderr
    assert sandbox.calls() == [chosen]


def test_an_interpreter_asked_for_is_taken_or_refused_but_never_replaced(sandbox: Sandbox) -> None:
    sandbox.python("python3", WORKS)
    sandbox.python("python3.13", WORKS)
    sandbox.python("python3.12", SHIM)
    assert sandbox.setup(PYTHON="python3.13").returncode == 0
    assert sandbox.calls() == ["python3.13"]
    for name in ("python3.12", "/nowhere/python"):
        result = sandbox.setup(PYTHON=name)
        assert result.returncode == 1
        assert f"{name} (does not run)" in result.stderr
    assert sandbox.calls() == []


@pytest.mark.parametrize(
    ("release", "verdict", "line"),
    [
        ("ID=debian\nVERSION_ID=12", None, "sudo apt-get update && sudo apt-get install -y make python3 python3-venv"),
        ("ID=debian\nVERSION_ID=12", NO_VENV, "sudo apt-get update && sudo apt-get install -y make python3.12-venv"),
        ("ID=ubuntu\nID_LIKE=debian\nVERSION_ID=24.04", OLD, "sudo apt-get update && sudo apt-get install -y make python3 python3-venv"),
        (
            "ID=ubuntu\nID_LIKE=debian\nVERSION_ID=22.04",
            OLD,
            "sudo apt-get update && sudo apt-get install -y make python3.11 python3.11-venv",
        ),
        ("ID=ubuntu\nID_LIKE=debian\nVERSION_ID=20.04", OLD, "upgrade the system, or install one with pyenv, uv or conda"),
        ("ID=debian\nVERSION_ID=11", OLD, "upgrade the system, or install one with pyenv, uv or conda"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_ID=22', None, "apt-get install -y make python3 python3-venv"),
        ("ID=fedora\nVERSION_ID=43", OLD, "sudo dnf install -y make python3"),
        ('ID=rocky\nID_LIKE="rhel centos fedora"', OLD, "sudo dnf install -y make python3.12"),
        ("ID=arch", None, "by your package manager"),
    ],
)
def test_without_a_python_the_line_that_installs_one_is_printed(release: str, verdict: str | None, line: str, sandbox: Sandbox) -> None:
    if verdict:
        sandbox.python("python3", verdict)
    result = sandbox.setup(release=release)
    assert result.returncode == 1
    assert line in result.stderr
    assert "3.11 to 3.14" in result.stderr


@pytest.mark.parametrize(("system", "line"), [("Darwin", "brew install python@3.12"), ("MINGW64_NT-10.0", "wsl --install")])
def test_macos_and_windows_get_lines_of_their_own(system: str, line: str, sandbox: Sandbox) -> None:
    sandbox.tool("uname", f"echo {system}")
    assert line in sandbox.setup().stderr


def test_a_second_run_does_nothing_until_something_changes(sandbox: Sandbox) -> None:
    sandbox.python("python3", WORKS)
    sandbox.setup()
    assert sandbox.calls() == ["python3"]
    for unchanged in ({}, {"TORCH": "auto"}, {"TORCH": "cpu"}):
        result = sandbox.setup(**unchanged)
        assert (result.returncode, result.stderr, sandbox.calls()) == (0, "", [])
    for name in ("pyproject.toml", "constraints.txt", "scripts/install.py"):
        with (sandbox.root / name).open("a") as file:
            file.write("\n")
        sandbox.setup()
        assert sandbox.calls() == ["python3"], f"{name} changed"
    sandbox.setup(TORCH="cuda", FAKE_BUILD="cuda")
    assert sandbox.calls() == ["python3"]
    sandbox.python("python3.13", WORKS)
    sandbox.setup(PYTHON="python3.13")
    assert sandbox.calls() == ["python3.13"]
    sandbox.setup()
    assert sandbox.calls() == [], "the interpreter once chosen stays chosen"


def test_an_environment_that_was_cut_short_moved_or_lost_its_python_is_set_up_again(sandbox: Sandbox) -> None:
    sandbox.python("python3", WORKS)
    sandbox.setup()
    (sandbox.root / ".venv" / ".setup-done").unlink()
    sandbox.setup()
    assert len(sandbox.calls()) == 2
    (sandbox.root / ".venv" / "bin" / "python").unlink()
    sandbox.setup()
    assert len(sandbox.calls()) == 1
    sandbox.root = sandbox.root.rename(sandbox.root.with_name("byrote moved"))
    sandbox.setup()
    assert len(sandbox.calls()) == 1


def test_a_folder_of_somebody_else_is_not_touched(sandbox: Sandbox) -> None:
    sandbox.python("python3", WORKS)
    (sandbox.root / ".venv").mkdir()
    (sandbox.root / ".venv" / "letter.txt").write_text("dear")
    result = sandbox.setup()
    assert result.returncode == 1
    assert "is no virtual environment" in result.stderr
    assert sandbox.calls() == []


def test_an_unknown_build_of_torch_is_refused_before_anything_happens(sandbox: Sandbox) -> None:
    sandbox.python("python3", WORKS)
    result = sandbox.setup(TORCH="rocm")
    assert result.returncode == 1
    assert "allowed: auto, cpu, cuda" in result.stderr
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
def test_make_alone_explains_the_two_commands_and_hands_settings_on(sandbox: Sandbox) -> None:
    sandbox.python("python3", WORKS)
    sandbox.python("python3.14", WORKS)
    make = ["make", "-C", str(sandbox.root), "--no-print-directory"]
    variables = {"PATH": str(sandbox.bin)}
    said = subprocess.run(make, env=variables, capture_output=True, text=True, check=True).stdout
    assert "make quickstart" in said
    assert "make test" in said
    subprocess.run([*make, "setup", "PYTHON=python3.14", "VENV=elsewhere"], env=variables, check=True, capture_output=True)
    assert sandbox.calls() == ["python3.14"]
    assert (sandbox.root / "elsewhere" / ".setup-done").exists()


@pytest.mark.parametrize(
    ("version", "needs", "build"),
    [
        ("2.13.0+cpu", [], "cpu"),
        ("2.13.0+cu130", [], "cuda"),
        ("2.13.0", ["filelock", "nvidia-cublas==13; platform_system == 'Linux' and platform_machine == 'x86_64'"], "cuda"),
        ("2.13.0", ["filelock", "triton==3.7; extra == 'compile'"], "cpu"),
    ],
)
def test_the_build_of_torch_is_read_from_its_metadata(version: str, needs: list[str], build: str, install, monkeypatch) -> None:
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    assert install.build_of({"version": version, "requires_dist": needs}) == build
    monkeypatch.setattr(install.platform, "machine", lambda: "aarch64")
    assert install.build_of({"version": "2.13.0", "requires_dist": needs}) == "cpu", "its CUDA libraries are for another processor"


@pytest.mark.parametrize(("asked", "build"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_the_opposite_of_what_was_asked_is_refused_with_the_way_to_get_it(asked: str, build: str, install, capsys, monkeypatch) -> None:
    monkeypatch.setattr(install.sys, "platform", "linux")
    with pytest.raises(SystemExit):
        install.check_choice(asked, build)
    said = capsys.readouterr().err
    assert f"make setup TORCH={asked} TORCH_INDEX_URL=ADDRESS" in said
    assert "pytorch.org" in said


def test_auto_goes_on_with_what_there_is_and_says_what_else_could_be_had(install, capsys, monkeypatch) -> None:
    for driver, build, word in ((False, "cuda", "TORCH=cpu"), (True, "cpu", "TORCH=cuda"), (True, "cuda", ""), (False, "cpu", "")):
        monkeypatch.setattr(install, "has_nvidia_driver", lambda driver=driver: driver)
        install.check_choice("auto", build)
        said = capsys.readouterr().err
        assert word in said if word else said == ""


def test_a_package_that_was_cut_short_is_installed_again(install) -> None:
    packages = install.VENV / "lib" / "python3.11" / "site-packages"
    for name, record in (
        ("whole-1.0", "whole-1.0.dist-info/INSTALLER,sha256=x,4\n"),
        ("unpacked-1.0", "unpacked/__init__.py,,\n"),
        ("begun-1.0", None),
    ):
        info = packages / f"{name}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").touch()
        if record:
            (info / "RECORD").write_text(record)
    install.drop_half_installed()
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


@pytest.mark.skipif(not Path(sys.prefix, ".setup-done").exists(), reason="this environment was not made by scripts/setup.sh")
def test_every_package_here_passes_for_whole(install, monkeypatch) -> None:
    """The mark that pip leaves, seen in the real environment: nothing in it may be thrown away."""
    dropped: list[Path] = []
    monkeypatch.setattr(install, "VENV", Path(sys.prefix))
    monkeypatch.setattr(install.shutil, "rmtree", dropped.append)
    install.drop_half_installed()
    assert dropped == []


def test_too_little_disk_stops_before_the_download(install, monkeypatch) -> None:
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1024**3))
    with pytest.raises(SystemExit):
        install.check_disk("cpu")


def test_everything_that_make_installs_is_pinned() -> None:
    """Follows the requirements of byrote[dev] through the packages that are installed here."""
    pinned = {canonicalize_name(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    to_do = [Requirement(need) for need in project["dependencies"] + project["optional-dependencies"]["dev"]]
    seen: set[str] = set()
    while to_do:
        need = to_do.pop()
        name = canonicalize_name(need.name)
        wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in need.extras or {""})
        if (
            not wanted or name in seen or name.startswith(("nvidia-", "cuda-", "triton"))
        ):  # torch pins the libraries of its CUDA build itself
            continue
        seen.add(name)
        try:
            to_do += [Requirement(line) for line in importlib.metadata.requires(name) or () if "extra ==" not in line]
        except importlib.metadata.PackageNotFoundError:  # a development tool that this environment does without
            continue
    assert len(seen) > 20
    assert seen <= pinned, f"not pinned: {sorted(seen - pinned)}"
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#")


def test_the_verdict_on_this_interpreter_is_that_it_works(sandbox: Sandbox) -> None:
    """The one part that the fakes skip: the question itself, put to a real interpreter."""
    script = (ROOT / "scripts" / "setup.sh").read_text()
    question = re.search(r"\"\$1\" -c '\n(.*?)\n'", script, re.DOTALL).group(1)
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True, env={**os.environ, "HOME": "/"})
    assert answer.stdout.strip() in ("works", f"no-venv {sys.version_info.major}.{sys.version_info.minor}")
