import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from byrote.cli import doctor

ROOT = Path(__file__).parents[1]


def diagnose(*options: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(options))


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch):
    """Makes packages look as if they were not installed."""
    absent: set[str] = set()
    find, load = importlib.util.find_spec, importlib.import_module

    def import_module(name: str):
        if name in absent:
            raise ImportError(f"No module named {name!r}")
        return load(name)

    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    monkeypatch.setattr(doctor, "check_compiled_paths", lambda: doctor.Finding("ok", "kernels", "not looked at here"))
    return absent


def test_a_sound_installation_passes_and_every_part_is_named(capsys: pytest.CaptureFixture) -> None:
    assert diagnose() == 0
    out = capsys.readouterr().out
    assert "byrote can work here" in out
    for topic in ("python", "torch", "machine", "device cpu", "ram", "disk", "table disk", "kernels", "numpy", *doctor.EXTRAS):
        assert re.search(rf"^(ok|note) +{topic} ", out, re.MULTILINE), topic


def test_json_holds_the_same_findings(capsys: pytest.CaptureFixture) -> None:
    assert diagnose("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert {finding["grade"] for finding in report["findings"]} <= {"ok", "note"}


@pytest.mark.parametrize("package", ["torch", "numpy", "safetensors", "tokenizers"])
def test_a_missing_essential_fails_with_the_line_that_installs_it(package: str, missing: set[str], capsys: pytest.CaptureFixture) -> None:
    missing.add(package)
    assert diagnose() == 1
    out = capsys.readouterr().out
    assert re.search(rf"^FAIL +{package} ", out, re.MULTILINE)
    assert re.search(rf"-m pip install '?{package}", out)
    assert "1 of " in out


def test_a_missing_extra_is_a_note_with_the_line_that_installs_it(missing: set[str], capsys: pytest.CaptureFixture) -> None:
    missing.add("transformers")
    assert diagnose() == 0
    assert "hf: " + sys.executable + " -m pip install 'transformers>=5.17'" in capsys.readouterr().out


def test_old_python_and_old_torch_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 9))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert doctor.check_python().grade == "FAIL"
    assert doctor.check_torch().grade == "FAIL"


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234", "2.11.0.dev20260101+cu130"])
def test_torch_versions_are_compared_as_numbers(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "__version__", version)
    assert doctor.check_torch().grade == "ok"


def test_a_nearly_full_disk_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byrote.device.disk_free", lambda path: 1024**2)
    findings = {finding.topic: finding for finding in doctor.check_machine(".")}
    assert findings["disk"].grade == "note"
    assert "1.0 MB free" in findings["disk"].text
    assert "another disk" in findings["disk"].advice


def test_a_device_that_does_not_compute_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> float:
        raise RuntimeError("driver too old")

    monkeypatch.setattr("byrote.device.matmul_peak", broken)
    assert [finding.grade for finding in doctor.check_devices()][-1] == "FAIL"


def test_without_compiled_kernels_the_references_serve_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYROTE_NATIVE", "0")
    finding = doctor.check_compiled_paths()
    assert finding.grade == "note"
    assert finding.text == "reference kernels only: switched off by BYROTE_NATIVE=0"


def test_a_setting_that_every_command_would_refuse_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYROTE_NATIVE", "perhaps")
    finding = doctor.check_compiled_paths()
    assert finding.grade == "FAIL"
    assert "BYROTE_NATIVE" in finding.text


def test_a_kernel_that_did_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "compiled_kernels", lambda: {"sinkhorn": True, "hyper_mix": False})
    report = {"active": False, "reason": "hyper_mix: cc failed", "compiler": "cc", "threads": 4}
    monkeypatch.setattr("byrote.kernels.native.status", lambda: report)
    finding = doctor.check_compiled_paths()
    assert finding.grade == "note"
    assert finding.text == "sinkhorn in C on 4 threads, by cc; by reference: hyper_mix"
    assert finding.advice == "hyper_mix: cc failed"


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {name: [need.split(";")[0] for need in needs] for name, needs in project["optional-dependencies"].items() if name != "dev"}
    assert declared == {name: list(packages) for name, (_, packages) in doctor.EXTRAS.items()}
    assert sorted(re.split("[>=]", need)[0] for need in project["dependencies"]) == sorted(["torch", *doctor.ESSENTIAL])


def test_the_doctor_itself_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import byrote.cli.doctor as d; sys.exit(d.check_torch().grade != 'FAIL')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_disk_that_cannot_be_tried_is_a_note_and_nothing_is_left_on_one_that_can(tmp_path: Path) -> None:
    finding = doctor.check_table_disk(str(tmp_path / "nowhere"))
    assert finding.grade == "note" and "No such file" in finding.text
    doctor.check_table_disk(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
