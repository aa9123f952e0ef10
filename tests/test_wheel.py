"""The package that users install: built from this checkout, and working where no checkout is."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MISSING = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"building a wheel needs {', '.join(MISSING)} in this environment")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that no build folder is left in the checkout or taken from an earlier build."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "byrote"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    command = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_there(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *arguments], cwd=installed, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "byrote").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_the_installed_package_is_found_outside_the_checkout(installed: Path) -> None:
    result = run_there(installed, "-c", "import byrote, byrote.errors; print(byrote.__file__)")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(installed)


def test_the_installed_command_answers(installed: Path) -> None:
    result = run_there(installed, "-m", "byrote", "--help")
    assert result.returncode == 0, result.stderr
    assert "doctor" in result.stdout


def test_the_entry_point_names_a_function_that_exists(wheel: Path, installed: Path) -> None:
    (entry,) = (
        zipfile.ZipFile(wheel).read(name).decode() for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt")
    )
    module, function = re.search(r"^byrote *= *([\w.]+):(\w+)$", entry, re.MULTILINE).groups()
    result = run_there(installed, "-c", f"import sys; sys.argv[1:] = ['--help']; from {module} import {function}; sys.exit({function}())")
    assert result.returncode == 0, result.stderr


def test_the_wheel_carries_licence_and_requirements(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(name.endswith("LICENSE") for name in names)
    metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata
    for need in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        assert f"Requires-Dist: {need}" in metadata
