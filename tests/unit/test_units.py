"""Numbers as people read and write them."""

import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunewright.core.units import (
    chunks,
    human_bytes,
    human_count,
    human_seconds,
    parse_bytes,
    peak_memory_bytes,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KB"),
        (1536, "1.5 KB"),
        (5 * 2**20, "5.0 MB"),
        (2.5 * 2**30, "2.5 GB"),
        (3 * 2**40, "3.0 TB"),
        (5000 * 2**40, "5000.0 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2s"),
        (9.94, "9.9s"),
        (42.4, "42s"),
        (75, "1m15s"),
        (605, "10m05s"),
        (3599.7, "1h00m"),
        (9000, "2h30m"),
    ],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (999, "999"), (1000, "1 k"), (5_120, "5.12 k"), (5_510_000, "5.51 M"), (7_000_000_000, "7 B")],
)
def test_human_count(count: float, text: str) -> None:
    assert human_count(count) == text


@given(st.integers(0, 10**11))
@example(999_999)
def test_human_count_is_never_in_scientific_notation(count: int) -> None:
    assert "e" not in human_count(count)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1000", 1000), ("24GB", 24 * 2**30), ("512 MiB", 512 * 2**20), ("1.5k", 1536), (" 2 TB ", 2 * 2**40)],
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "GB", "-1GB", "1.2.3GB", "24 XB"])
def test_parse_bytes_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|could not convert"):
        parse_bytes(text)


def test_peak_memory_is_in_bytes() -> None:
    assert 2**20 < peak_memory_bytes() < 2**40


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = bytearray(400 << 20)
    code = "from tunewright.core.units import peak_memory_bytes; print(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(told) < 100 << 20 < len(held)


@given(st.lists(st.integers()), st.integers(1, 5))
def test_chunks_keep_every_item_in_order(items: list[int], size: int) -> None:
    pieces = list(chunks(iter(items), size))
    assert [item for piece in pieces for item in piece] == items
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(0 < len(piece) <= size for piece in pieces)
