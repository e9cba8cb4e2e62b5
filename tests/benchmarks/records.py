"""Measurements on disk as they are made, so that a benchmark that is stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.files import whole_file
from tests.benchmarks.training import CACHE

DOCS = Path("docs/benchmarks")

Setting = Literal["quick", "full"]
"""How much is measured: something to see within minutes, or all that the documentation shows."""


class Records:
    """Rows of one benchmark; what makes a row unique are those of its values that are no measurements."""

    def __init__(self, name: str, setting: Setting, fresh: bool = False) -> None:
        self._path = CACHE / "measured" / setting / f"{name}.jsonl"
        if fresh:
            self._path.unlink(missing_ok=True)
        self.rows: list[dict[str, Any]] = []
        if self._path.exists():
            self.rows = [json.loads(line) for line in self._path.read_text().splitlines()]

    def has(self, **case: object) -> bool:
        """Whether there is a row with these values."""
        return any(True for _ in self.where(**case))

    def where(self, **case: object) -> Iterator[dict[str, Any]]:
        """The rows with these values."""
        return (row for row in self.rows if all(row.get(key) == value for key, value in case.items()))

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(dict(row))
        with whole_file(self._path) as temporary:
            temporary.write_text("".join(json.dumps(one) + "\n" for one in self.rows))

    def write_parquet(self, path: Path) -> None:
        """The same as Parquet, for people who want to look further."""
        with whole_file(path) as temporary:
            pq.write_table(pa.Table.from_pylist(self.rows), temporary)
