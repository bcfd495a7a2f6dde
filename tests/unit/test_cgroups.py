"""Limits of control groups, of both versions, nested or seen from within a container."""

from pathlib import Path

import pytest

from tunewright.core import cgroups, machine


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    return tmp_path


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_without_groups_there_is_plenty(system):
    assert (cgroups.memory_room(), cgroups.cores()) == (cgroups.PLENTY, cgroups.PLENTY)


def test_a_container_sees_its_own_group_as_the_root(system):
    put(system, own="0::/docker/abc", memory__max="1000", memory__current="700", cpu__max="150000 100000")
    put(system, memory__stat="anon 500\ninactive_file 60\nactive_file 40")
    assert cgroups.memory_room() == 400
    assert cgroups.cores() == 1.5


def test_the_tightest_of_nested_groups_counts(system):
    put(system, own="0::/user/job", memory__max="max")
    put(system / "user", memory__max="900", memory__current="800", cpu__max="max 100000")
    put(system / "user" / "job", memory__max="500", memory__current="100", cpu__max="400000 100000")
    assert cgroups.memory_room() == 100
    assert cgroups.cores() == 4


def test_so_it_is_in_the_first_version(system):
    put(system, own="9:name=systemd:/\n4:memory:/slurm/job\n2:cpu,cpuacct:/slurm\n0::/")
    job = {
        "memory__limit_in_bytes": "2000",
        "memory__usage_in_bytes": "1500",
        "memory__stat": "inactive_file 7\ntotal_inactive_file 250\ntotal_active_file 50",
    }
    put(system / "memory" / "slurm" / "job", **job)
    put(system / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    put(system / "cpu" / "slurm", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    put(system / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cgroups.memory_room() == 800
    assert cgroups.cores() == 2


def test_the_machine_ends_where_its_groups_do(system):
    put(system, own="0::/", memory__max="1000", memory__current="999", cpu__max="50000 100000")
    assert machine.available_memory() == 1
    assert machine.cores() == 1
