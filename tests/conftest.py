"""What all tests share: servers are real ones, on free ports; hypothesis never judges by the clock.

`make test` draws the same cases each time, so that it says something about the change at hand; `make fuzz` draws new
ones, and many more of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kept import Place, url_of
from postgres import Cluster, cluster
from redis_server import RedisServer, redis_server
from serving import Gateway, gateway_process, serving
from tidegate.testing import FakeUpstream

_unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("tidegate", _unhurried, derandomize=True)
settings.register_profile("fuzz", _unhurried, max_examples=1000, print_blob=True)
settings.load_profile("tidegate")

_schemas = itertools.count()


@pytest.fixture(scope="session")
def _upstream_server() -> Iterator[tuple[FakeUpstream, str]]:
    upstream = FakeUpstream()
    with serving(upstream) as url:
        yield upstream, url


@pytest.fixture
def upstream(_upstream_server: tuple[FakeUpstream, str]) -> FakeUpstream:
    """A fake upstream behind a real uvicorn server; as new for each test."""
    fake, _ = _upstream_server
    fake.reply = FakeUpstream().reply
    fake.received.clear()
    return fake


@pytest.fixture(scope="session")
def upstream_url(_upstream_server: tuple[FakeUpstream, str]) -> str:
    """Where the fake upstream listens."""
    return _upstream_server[1]


@pytest.fixture(scope="session")
def _gateway_process(
    _upstream_server: tuple[FakeUpstream, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with gateway_process(_upstream_server[1], tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway


@pytest.fixture
def gateway(_gateway_process: Gateway, upstream: FakeUpstream) -> Gateway:
    """A gateway in a process of its own, in front of ``upstream``, with a fake guard; its record is empty."""
    _gateway_process.forget()
    return _gateway_process


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    """A file with the policy of the gateway process."""
    path = tmp_path / "policy.yaml"
    path.write_text(Gateway.POLICY, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[RedisServer | None]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis(_redis_server: RedisServer | None) -> RedisServer:
    """A real Redis that runs, and is empty; a test may kill it."""
    if _redis_server is None:
        pytest.skip("redis-server is not installed")
    if not _redis_server.runs:
        _redis_server.start()
    _redis_server.flush()
    return _redis_server


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
    name = f"place_{next(_schemas)}"
    Place(made.url, tmp_path).run(f"CREATE SCHEMA {name}")
    return Place(f"{made.url}&options=-csearch_path%3D{name}", tmp_path)
