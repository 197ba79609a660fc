"""Decisions to keep, and databases to keep them in, for the tests of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tidegate.store import Store, open_store
from tidegate.types import Action, Conversation, Decision, Probabilities, Severity, Target, Verdict

TALK = Conversation.of("my address is ann@example.org", "noted")


def decision(action: Action = Action.ALLOW, **changes: Any) -> Decision:
    verdict = Verdict(Target.PROMPT, Severity.SAFE, Probabilities(0.9, 0.06, 0.04), guard="fake/1")
    return Decision(action, "otherwise", "balanced", "0123456789ab", **({"verdict": verdict} | changes))


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


class Place:
    """An empty database, as an operator sees it, and a folder for its spool."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.spool = folder / "spool"
        self.in_postgresql = url.startswith("postgresql")

    def open(self, **options: Any) -> Store:
        return open_store(self.url, **{"spool": self.spool, **options})

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement, as somebody would who has a console of the database; gives its rows."""
        engine = sa.create_engine(self.url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        with engine.begin() as connection:
            result = connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []
