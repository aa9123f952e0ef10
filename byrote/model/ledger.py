"""What a run costs: FLOPs → device-hours → dollars, with every assumption named.

    hours   = FLOPs / (peak · MFU) / 3600          peak: FLOP/s of one device, dense, bf16
    dollars = hours · price

The peak is the vendor's figure (or a measurement), the price the user's. MFU, the share of the peak that the counted FLOPs
reach, is the assumption that decides the answer, so it is checked from the other side: published device-hours, our FLOP count
and the peak give the MFU that a published run must have had (`implied_mfu`).

    worked example: 14.8T tokens of V3 in 2,664K H800-hours. At 260.6 GFLOPs a token in training (4,096 tokens, MTP included)
    that is 3.86e24 FLOPs, 4.02e14 per second and device, 41 % of 989e12.

Hours and prices of V3: arXiv 2412.19437, Table 1; of R1: arXiv 2501.12948 v2, Table 7.
"""

from dataclasses import dataclass
from typing import NamedTuple

from byrote.config import nearest
from byrote.errors import ConfigError

DEFAULT_MFU = 0.4  # what V3's published hours imply
THIS_MACHINE = "this-machine"


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator by its data sheet: FLOP/s without sparsity and with fp32 accumulation."""

    bf16: float
    fp8: float | None  # None: no FP8 units
    price: float | None = None  # dollars an hour where a paper names one; otherwise the user must


DEVICES: dict[str, Device] = {
    "H800": Device(bf16=989.4e12, fp8=1978.9e12, price=2.0),  # price: V3 and R1
    "H100": Device(bf16=989.4e12, fp8=1978.9e12),
    "H200": Device(bf16=989.4e12, fp8=1978.9e12),
    "A100": Device(bf16=312e12, fp8=None),
    "B200": Device(bf16=2250e12, fp8=4500e12),
    "RTX 4090": Device(bf16=165.2e12, fp8=330.3e12),
}


def find_device(name: str) -> tuple[str, Device]:
    """(its name in the table, the device); case, blanks, "-" and "_" do not matter. ConfigError with the nearest name otherwise."""
    plain = {_plain(known): known for known in DEVICES}
    if _plain(name) not in plain:
        names = (*DEVICES, THIS_MACHINE)
        raise ConfigError(f"unknown device {name!r}; nearest: {nearest(name, names)}. All: {', '.join(names)}")
    known = plain[_plain(name)]
    return known, DEVICES[known]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in " -_")


class Cost(NamedTuple):
    flops: float
    device_hours: float
    dollars: float | None  # None: no price known


def run_cost(flops: float, *, peak: float, mfu: float, price: float | None) -> Cost:
    """`peak` in FLOP/s of one device, `price` in dollars per device-hour. ConfigError if MFU is no share or the price negative."""
    if not 0 < mfu <= 1:
        raise ConfigError(f"MFU is {mfu:g}; it is a share of the peak: above 0, at most 1 (0.4 = 40 %)")
    if price is not None and price < 0:
        raise ConfigError(f"the price is {price:g} dollars an hour; it cannot be negative")
    hours = flops / (peak * mfu) / 3600
    return Cost(flops, hours, None if price is None else hours * price)


def implied_mfu(flops: float, device_hours: float, peak: float) -> float:
    """The share of `peak` at which `flops` take `device_hours`."""
    return flops / (device_hours * 3600 * peak)


class Stage(NamedTuple):
    """A published part of a run. Only stages with a token count allow a check of their hours."""

    name: str
    device_hours: float
    tokens: tuple[tuple[float, int], ...] = ()  # (tokens, sequence length) of its phases


class PublishedRun(NamedTuple):
    device: str
    price: float
    stages: tuple[Stage, ...]
    source: str

    @property
    def device_hours(self) -> float:
        return sum(stage.device_hours for stage in self.stages)

    @property
    def dollars(self) -> float:
        return self.device_hours * self.price


PUBLISHED_RUNS: dict[str, PublishedRun] = {
    "v3": PublishedRun(
        "H800",
        2.0,
        (
            Stage("pre-training", 2664e3, ((14.8e12, 4096),)),
            Stage("context extension", 119e3, ((1000 * 1920 * 32_768.0, 32_768), (1000 * 480 * 131_072.0, 131_072))),
            Stage("post-training", 5e3),
        ),
        "arXiv 2412.19437, Table 1",
    ),
    "r1": PublishedRun(
        "H800",
        2.0,
        (Stage("R1-Zero", 101e3), Stage("SFT data", 5e3), Stage("R1", 41e3)),
        "arXiv 2501.12948 v2, Table 7",
    ),
}
