"""The same tests on both databases: SQLite in a file, and PostgreSQL where it is installed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from kept import Place, url_of
from postgres import Cluster, cluster

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL for the session."""
    with cluster() as made:
        if made is None:
            pytest.skip("PostgreSQL is not installed")
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty SQLite file, then an empty schema of PostgreSQL."""
    if request.param == "sqlite":
        return Place(url_of(tmp_path / "kept.db"), tmp_path)
    made: Cluster = request.getfixturevalue("postgres")
    name = f"place_{next(_numbers)}"
    Place(made.url, tmp_path).run(f"CREATE SCHEMA {name}")
    return Place(f"{made.url}&options=-csearch_path%3D{name}", tmp_path)
