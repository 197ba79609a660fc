"""Kept decisions as a Parquet file, for pandas, DuckDB, Spark. Needs ``pip install 'tidegate[parquet]'``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from tidegate.store.decisions import KeptDecision
from tidegate.store.export import export_row

__all__ = ["write_parquet"]

GROUP: Final = 10_000
"""Decisions in one row group, which is also what is held in memory at once."""

_TEXT: Final = pa.string()
_COUNTS: Final = ("count", "characters", "tokens")
_SCHEMA: Final = pa.schema(
    [
        pa.field("id", _TEXT, nullable=False),
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("action", _TEXT, nullable=False),
        pa.field("rule", _TEXT, nullable=False),
        pa.field("policy", _TEXT, nullable=False),
        pa.field("policy_version", _TEXT, nullable=False),
        pa.field("advice", pa.list_(_TEXT), nullable=False),
        pa.field("observed", pa.struct([("action", _TEXT), ("rule", _TEXT)])),
        pa.field("guard", _TEXT, nullable=False),
        pa.field("target", _TEXT),
        pa.field("severity", _TEXT),
        pa.field("probabilities", pa.struct([(name, pa.float64()) for name in ("safe", "controversial", "unsafe")])),
        pa.field("categories", pa.list_(_TEXT), nullable=False),
        pa.field("category_probabilities", pa.map_(_TEXT, pa.float64()), nullable=False),
        pa.field("refusal", pa.bool_()),
        pa.field("reason", _TEXT),
        pa.field("span", pa.list_(pa.int64())),
        pa.field("failure", pa.struct([("kind", _TEXT), ("message", _TEXT)])),
        *(pa.field(name, _TEXT) for name in ("tenant", "region", "route", "language", "subject")),
        pa.field(
            "interventions",
            pa.list_(
                pa.struct(
                    [("kind", _TEXT), ("outcome", _TEXT), *((name, pa.int64()) for name in _COUNTS)],
                )
            ),
            nullable=False,
        ),
        pa.field("leaked", pa.int64(), nullable=False),
        pa.field(
            "coverage",
            pa.list_(pa.struct([("path", _TEXT), ("channel", _TEXT), ("state", _TEXT), ("characters", pa.int64())])),
            nullable=False,
        ),
        pa.field("retention", _TEXT, nullable=False),
        pa.field("conversation", _TEXT),
        pa.field("fingerprint", _TEXT),
    ]
)


def write_parquet(decisions: Iterable[KeptDecision], out: BinaryIO) -> int:
    """Write a file, zstd inside; returns how many decisions. ``conversation`` is JSON text, as it is in the database.

    What is not valid Unicode is replaced outside of it: Parquet has no place for it. Raises OSError.
    """
    rows = map(_row, decisions)
    count = 0
    with pq.ParquetWriter(out, _SCHEMA, compression="zstd") as writer:
        for group in iter(lambda: list(islice(rows, GROUP)), []):
            writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
            count += len(group)
    return count


def _row(kept: KeptDecision) -> dict[str, Any]:
    row = export_row(kept)
    conversation = row.pop("conversation")
    row = {name: _valid(value) for name, value in row.items()}
    row["time"] = datetime.fromisoformat(row["time"])
    row["category_probabilities"] = list(row["category_probabilities"].items())
    row["conversation"] = None if conversation is None else json.dumps(conversation)
    return row


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_valid(key): _valid(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_valid(each) for each in value]
    return value
