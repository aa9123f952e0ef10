import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byrote import device
from byrote.device import (
    autocast_dtype,
    available_devices,
    check_disk,
    check_memory,
    disk_free,
    machine_facts,
    matmul_peak,
    memory_bytes,
    pick_device,
    usable_cores,
)
from byrote.errors import CapacityError, ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_the_first_of_the_available_devices() -> None:
    assert pick_device("auto").type == available_devices()[0]
    assert pick_device("cpu") == CPU


def test_auto_prefers_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"


@pytest.mark.parametrize("name", ["cuda", "mps", "gpu", "", "CPU", "cpu:1", "cuda:x"])
def test_a_device_that_is_not_there_is_an_error_that_names_those_that_are(name: str, only_cpu: None) -> None:
    with pytest.raises(ConfigError, match="this machine has: auto, cpu"):
        pick_device(name)


def test_one_of_several_gpus_is_chosen_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="cuda:2"):
        pick_device("cuda:2")


def test_facts_are_complete_and_plausible(tmp_path: Path) -> None:
    facts = machine_facts(CPU, tmp_path)
    assert all(facts.values()), facts
    assert 0 < facts["ram_free_bytes"] <= facts["ram_bytes"]
    assert facts["torch"] == torch.__version__
    assert facts["device"] == "cpu"
    assert 1 <= usable_cores() == facts["cores"]


def test_peak_counts_two_operations_per_multiply_and_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([99.0, 1.0, 2.0, 50.0])  # the first one warms up
    monkeypatch.setattr(device, "_timed_product", lambda left, right: next(seconds))
    assert matmul_peak(CPU, torch.float32, size=8, repeats=3) == 2 * 8**3 / 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measured_peak_is_positive(dtype: torch.dtype) -> None:
    assert 0 < matmul_peak(CPU, dtype, size=65, repeats=1) < 1e18


def test_autocast_is_bf16_or_off() -> None:
    assert autocast_dtype(CPU) in (torch.bfloat16, torch.float32)


def test_autocast_is_off_where_bf16_would_crawl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert autocast_dtype(CPU) is torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert autocast_dtype(torch.device("cuda")) is torch.float32


def test_what_fits_passes_and_what_does_not_says_how_much_is_missing(tmp_path: Path) -> None:
    nowhere_yet = tmp_path / "runs" / "a" / "b"
    check_disk(nowhere_yet, 0, "a checkpoint")
    check_memory(0, "the table")
    with pytest.raises(CapacityError, match=r"a checkpoint needs 931322\.57 GiB of disk at .*runs/a/b, and .* GiB are free; free some"):
        check_disk(nowhere_yet, 10**15, "a checkpoint")
    with pytest.raises(CapacityError, match=r"the table needs 931322\.57 GiB of RAM"):
        check_memory(10**15, "the table")
    assert not nowhere_yet.parent.exists(), "checking makes nothing"
    assert disk_free(nowhere_yet) > 0


def test_inside_a_container_its_own_memory_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_system_memory", lambda: (1000, 800))
    monkeypatch.setattr(device, "CONTROL_GROUP", tmp_path)
    assert memory_bytes() == (1000, 800)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes() == (1000, 800)
    (tmp_path / "memory.max").write_text("500\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 100\nactive_file 0\n")
    assert memory_bytes() == (500, 300), "the file cache in it can be taken back"


def test_memory_is_read_from_vm_stat_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    report = "Mach Virtual Memory Statistics:\nPages free:    10.\nPages active:   99.\nPages inactive:  5.\nPages speculative:  1.\n"
    monkeypatch.setattr(device, "_output_of", lambda *command: report)
    monkeypatch.setattr(device.os, "sysconf", lambda name: 16384)
    assert device._macos_free_bytes(1) == 16 * 16384
    monkeypatch.setattr(device, "_output_of", lambda *command: "")
    assert device._macos_free_bytes(7) == 7


_FAULTS = """
import resource, sys
from byrote.device import keep_freed_memory
import torch
taken = sys.argv[1] == "keep" and keep_freed_memory()
def step():
    [torch.ones(10 << 20) for _ in range(6)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(int(taken), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_kept_memory_is_used_again_without_page_faults() -> None:
    def faults(mode: str) -> tuple[int, int]:
        out = subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True, check=True).stdout
        taken, count = out.split()
        return int(taken), int(count)

    taken, kept = faults("keep")
    if not taken:
        pytest.skip("the allocator of this platform is not glibc's")
    assert 10 * kept < faults("default")[1]
