"""What a plan is for, as people write it; and the machine at hand."""

import resource
from pathlib import Path

import pytest

from tunewright.advise import hardware, measured
from tunewright.core.errors import HardwareError


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("8xH200", 8, "H200"), ("64 x a100", 64, "A100-40GB"), ("2×A100-80GB", 2, "A100-80GB"), ("mi300x", 1, "MI300X"),
     ("4*rtx4090", 4, "RTX-4090"), ("RTX 3090", 1, "RTX-3090"), ("NVIDIA A100-SXM4-80GB", 1, "A100-80GB"),
     ("NVIDIA H100 80GB HBM3", 1, "H100"), ("NVIDIA GeForce RTX 4090", 1, "RTX-4090"), ("Tesla V100-SXM2", 1, "V100")],
)  # fmt: skip
def test_devices_are_known_by_the_names_that_people_and_drivers_give(
    text: str, count: int, name: str
) -> None:
    fleet = hardware.parse(text)
    assert (fleet.count, fleet.device.name) == (count, name)


def test_a_size_alone_is_a_device() -> None:
    fleet = hardware.parse("2x24GB")
    assert (fleet.memory, fleet.node) == (2 * 24 << 30, 2)


def test_a_node_has_eight() -> None:
    assert hardware.parse("64xH100").node == 8


@pytest.mark.parametrize(
    ("text", "told"),
    [("8xH20", "did you mean 'H200'"), ("2xRTX 5090", "did you mean 'RTX-"), ("0xH100", "names no devices"),
     ("", "names no devices"), ("8x", "no device is called"), ("9999999xH100", "no device"), ("1x0GB", "no device")],
)  # fmt: skip
def test_what_is_no_device_is_refused(text: str, told: str) -> None:
    with pytest.raises(HardwareError, match=told):
        hardware.parse(text)


def test_less_memory_may_be_given_and_not_more() -> None:
    fleet = hardware.parse("2xH100")
    assert hardware.limited(fleet, 8 << 30).device.memory == 8 << 30
    assert hardware.limited(fleet, 800 << 30).device.memory == 80 << 30


def test_every_sheet_has_its_source() -> None:
    facts = hardware.table("devices.yaml")["devices"]
    assert all(
        sheet["source"] and sheet["rate"] > 0 and sheet["bandwidth"] > sheet["link"]
        for sheet in facts.values()
    )
    assert all(hardware.named(name, facts) == name for name in facts)


def test_the_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_LEAST", 0.001)
    first = measured.rates()
    monkeypatch.setattr(measured, "measure", lambda: pytest.fail("it was measured again"))
    assert measured.rates() == first
    assert first.fp32 > 1e8
    assert first.copy > 1e7


def test_a_damaged_memory_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path))
    rates = measured.Rates(1.0, 2.0, 3.0)
    monkeypatch.setattr(measured, "measure", lambda: rates)
    measured.rates()
    place = next(tmp_path.rglob("*.json"))
    place.write_text("{}")
    assert measured.rates() == rates
    assert place.read_text() != "{}"


def test_free_memory_ends_at_the_limits_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, 1 << 20))
    assert hardware.free_memory() == 1 << 20


def test_drivers_tell_of_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 140000'\necho 'NVIDIA H200, 140000'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fleet = hardware.here()
    assert (fleet.count, fleet.device.name, fleet.device.memory) == (2, "H200", 140000 << 20)
    assert fleet.device.here
    tool.write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.setattr(measured, "rates", lambda: measured.Rates(2e12, 1e12, 1e10))
    assert hardware.here().device.rate == 2e12
