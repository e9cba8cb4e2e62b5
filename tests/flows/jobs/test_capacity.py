from pathlib import Path

import pytest

from flows.jobs import capacity

GIB = 1 << 30


def test_a_containers_quota_bounds_the_cores(tmp_path: Path) -> None:
    own = capacity.cores(tmp_path)
    assert own >= 1
    for quota, expected in (("max 100000", own), ("250000 100000", min(own, 2)), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert capacity.cores(tmp_path) == expected


def test_a_containers_limit_bounds_the_memory(tmp_path: Path) -> None:
    unbounded = capacity.available_memory(tmp_path)
    assert unbounded > 0
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\nactive_file 500000\ninactive_file 500000\n")
    (tmp_path / "memory.max").write_text("4000000\n")
    assert capacity.available_memory(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity.available_memory(tmp_path) > 2_000_000


def test_places_fit_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "cores", lambda: 16)
    monkeypatch.setattr(capacity, "available_memory", lambda: 10 * GIB)
    assert capacity.places("auto", 1, None) == 16
    assert capacity.places("auto", 3, None) == 5
    assert capacity.places("auto", 1, 3.0) == 3
    assert capacity.places("auto", 32, None) == capacity.places("auto", 1, 20.0) == 1
    assert capacity.places(40, 32, 20.0) == 40
