"""The keys of clients: what a client shows to be let in, for which tenant it then speaks, and through which doors.

A key is shown once, when it is made: ``tdg_<id>_<secret>``. The id is public, and finds the row, so that no secret is
ever searched for. Of the secret only a keyed hash is kept: HMAC-SHA256 over the id and the secret. A fast hash is right
here, and a slow one (bcrypt, Argon2) would be wrong. Slow hashes make guessing dear where people choose what is
guessed; 32 random bytes cannot be guessed at any speed. And a slow hash for each request would let anybody wear the
gateway out by sending wrong keys. It is keyed, so that whoever can write to the database, and does not have the
installation's key, cannot make a secret that fits; it covers the id, so that a hash is worth nothing in another row.

Rows are never deleted: a key that was revoked stays in the list.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from tidegate.errors import InputError
from tidegate.store.database import Database
from tidegate.store.tables import Row, client_keys_table

__all__ = ["DOORS", "PREFIX", "USUAL_DOORS", "Allowance", "Key", "Keys", "KnownKey", "split_token"]

PREFIX: Final = "tdg"
SECRET_BYTES: Final = 32

USUAL_DOORS: Final = (
    "chat",
    "completions",
    "responses",
    "messages",
    "moderations",
    "guard",
    "live",
    "models",
)
"""What a key opens when nothing else is said: the doors for programs that talk to a model or a guard."""
DOORS: Final = (*USUAL_DOORS, "metrics", "console", "admin")
"""All doors; the last three show what others do."""

_TOKEN: Final = re.compile(rf"{PREFIX}_([0-9a-f]{{12}})_([0-9a-f]{{{2 * SECRET_BYTES}}})")
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
_MOST: Final = 1_000_000_000
_LOCK: Final = 0x746467206B657973
"""The advisory lock of those who change keys in a PostgreSQL database."""
_NOBODY: Final = "0" * 64

_column = client_keys_table.c


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much a key may do.

    Attributes:
        per_minute: requests, on average; None for any number.
        burst: requests that may come at once after a pause; None for a sixth of ``per_minute``, and at least 1.
        concurrent: exchanges that may be open at once; None for any number.
    """

    per_minute: int | None = None
    burst: int | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        for name in ("per_minute", "burst", "concurrent"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                raise InputError(f"expected a number from 1 to {_MOST:,}, got {value}", where=name)
        if self.burst is not None and self.per_minute is None:
            raise InputError("a burst needs a number of requests per minute", where="burst")


@dataclass(frozen=True, slots=True)
class Key:
    """A key, without its secret.

    Attributes:
        id: public; 12 hexadecimal digits.
        name: for people, who look for the key in a list.
        tenant: for whom it speaks.
        region: where that is, for the policy; None when not said.
        doors: what it opens; of `DOORS`.
        allowance: how much it may do.
        adapter: with which adapter of the guard its texts are judged; None for none.
        created: when it was made, in UTC.
        expires: when it ends; None for never.
        rotated: when its secret was last changed; None for never.
        old_until: until when the secret before that is still taken; None when it is not.
        revoked: when it was taken back; None while it is good.
    """

    id: str
    name: str
    tenant: str
    region: str | None
    doors: frozenset[str]
    allowance: Allowance
    adapter: str | None
    created: datetime
    expires: datetime | None = None
    rotated: datetime | None = None
    old_until: datetime | None = None
    revoked: datetime | None = None

    def is_good(self, now: datetime) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key with what its secret is checked against."""

    key: Key
    version: int
    secret_hash: str = field(repr=False)
    old_hash: str | None = field(default=None, repr=False)


def split_token(token: str) -> tuple[str, str] | None:
    """The id and the secret of ``tdg_<id>_<secret>``; None for anything else."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else (match[1], match[2])


class Keys:
    """The keys in one database. Safe to use from any thread.

    Args:
        database: where they are; its tables are there already.
        key: the installation's own, 32 bytes: the same as for fingerprints. Secrets are hashed with one made of it.
    """

    def __init__(self, database: Database, key: bytes) -> None:
        self._database = database
        self._pepper = hmac.digest(key, b"tidegate client keys", "sha256")

    def create(
        self,
        tenant: str,
        *,
        name: str = "",
        region: str | None = None,
        doors: Collection[str] = USUAL_DOORS,
        allowance: Allowance = Allowance(),
        adapter: str | None = None,
        expires: datetime | None = None,
    ) -> tuple[Key, str]:
        """Make a key. Returns it, and what the client shows: that cannot be had again.

        Args:
            tenant: for whom it speaks: letters, digits and ``._:/@+-``.
            name: for people; "" for the name of the tenant.
            region: for the policy; None for none.
            doors: what it opens, at least one of `DOORS`.
            allowance: how much it may do.
            adapter: of the guard; None for none.
            expires: when it ends; None for never.

        Raises:
            InputError: when one of these cannot be used.
            StoreError: when it could not be kept.
        """
        now = datetime.now(UTC)
        _check_word(tenant, "tenant")
        for word, where in ((region, "region"), (adapter, "adapter")):
            if word is not None:
                _check_word(word, where)
        if not _NAME.fullmatch(name or tenant):
            raise InputError("expected at most 200 characters in one line", where="name")
        unknown = sorted(set(doors) - set(DOORS))
        if unknown or not doors:
            said = f"unknown door {unknown[0]!r}" if unknown else "expected at least one door"
            raise InputError(f"{said}; there are {', '.join(DOORS)}", where="door")
        if expires is not None and expires <= now:
            raise InputError("expected a time that is still to come", where="expires")
        identity, secret = secrets.token_hex(6), secrets.token_hex(SECRET_BYTES)
        row: Row = {
            "id": identity,
            "name": name or tenant,
            "tenant": tenant,
            "region": region,
            "adapter": adapter,
            "doors": [door for door in DOORS if door in doors],
            "per_minute": allowance.per_minute,
            "burst": allowance.burst,
            "concurrent": allowance.concurrent,
            "created": now,
            "expires": expires,
            "secret_hash": self._hash(identity, secret),
        }
        with self._database.writing() as connection:
            version = self._next_version(connection)
            connection.execute(client_keys_table.insert().values(version=version, **row))
            made = _read(connection, identity)
        return made.key, f"{PREFIX}_{identity}_{secret}"

    def list(self, tenant: str | None = None) -> list[Key]:
        """All keys, or those of a tenant, oldest first; also those that are no longer good. Raises StoreError."""
        query = sa.select(client_keys_table).order_by(_column.created, _column.id)
        if tenant is not None:
            query = query.where(_column.tenant == tenant)
        with self._database.reading() as connection:
            return [_known(row).key for row in connection.execute(query).mappings()]

    def rotate(self, identity: str, *, grace: timedelta = timedelta(days=1)) -> tuple[Key, str]:
        """Give a key a new secret. Returns the key, and what the client shows from now on.

        Args:
            identity: the key's id.
            grace: how long the secret before is still taken; 0 for not at all. A secret before that one ends at once.

        Raises:
            InputError: when there is no such key, or it is no longer good.
            StoreError: when it could not be kept.
        """
        now = datetime.now(UTC)
        if not timedelta(0) <= grace <= timedelta(days=366):
            raise InputError("expected from 0 to 366 days", where="grace")
        secret = secrets.token_hex(SECRET_BYTES)
        with self._database.writing() as connection:
            version = self._next_version(connection)
            known = _read(connection, identity)
            if not known.key.is_good(now):
                raise InputError("this key was revoked or has expired: make a new one", where=identity)
            changes: Row = {
                "version": version,
                "secret_hash": self._hash(identity, secret),
                "rotated": now,
                "old_hash": known.secret_hash if grace else None,
                "old_until": now + grace if grace else None,
            }
            connection.execute(client_keys_table.update().where(_column.id == identity).values(changes))
            return _read(connection, identity).key, f"{PREFIX}_{identity}_{secret}"

    def revoke(self, identity: str) -> Key:
        """Take a key back, for good. One that was revoked before stays as it is.

        Raises:
            InputError: when there is no such key.
            StoreError: when it could not be kept.
        """
        with self._database.writing() as connection:
            version = self._next_version(connection)
            if _read(connection, identity).key.revoked is None:
                changes: Row = {"version": version, "revoked": datetime.now(UTC)}
                connection.execute(client_keys_table.update().where(_column.id == identity).values(changes))
            return _read(connection, identity).key

    def changed_since(self, version: int) -> tuple[int, Sequence[KnownKey]]:
        """The newest version, and the keys that changed after this one; 0 for all. Raises StoreError.

        A newest version below the one asked about means that the database went back in time: then ask for all.
        """
        with self._database.reading() as connection:
            query = sa.select(client_keys_table).where(_column.version > version).order_by(_column.version)
            found = [_known(row) for row in connection.execute(query).mappings()]
            if found:
                return found[-1].version, found
            newest: int | None = connection.execute(sa.select(sa.func.max(_column.version))).scalar()
        return newest or 0, ()

    def admits(self, known: KnownKey | None, identity: str, secret: str, now: datetime) -> bool:
        """Whether this secret is that of the key, and the key is good. None is no key at all.

        It takes as long whatever is wrong: also for a key that is not there, a hash is made and compared.
        """
        shown = self._hash(identity, secret)
        current = hmac.compare_digest(shown, known.secret_hash if known else _NOBODY)
        old = hmac.compare_digest(shown, (known.old_hash if known else None) or _NOBODY)
        if known is None:
            return False
        in_grace = known.key.old_until is not None and now < known.key.old_until
        return (current or (old and in_grace)) and known.key.is_good(now)

    def _hash(self, identity: str, secret: str) -> str:
        return hmac.digest(self._pepper, f"{identity}:{secret}".encode(), "sha256").hex()

    def _next_version(self, connection: sa.Connection) -> int:
        """The version of the change at hand: changes are made, and seen, one after the other."""
        if self._database.in_postgresql:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        newest: int | None = connection.execute(sa.select(sa.func.max(_column.version))).scalar()
        return (newest or 0) + 1


def _check_word(word: str, where: str) -> None:
    if not _WORD.fullmatch(word):
        raise InputError("expected at most 200 letters, digits and ._:/@+- (first a letter or digit)", where=where)


def _read(connection: sa.Connection, identity: str) -> KnownKey:
    row = connection.execute(sa.select(client_keys_table).where(_column.id == identity)).mappings().first()
    if row is None:
        raise InputError("there is no key with this id; tidegate keys list shows them", where="id")
    return _known(row)


def _known(row: Mapping[Any, Any]) -> KnownKey:
    names = ("id", "name", "tenant", "region", "adapter", "created", "expires", "rotated", "old_until", "revoked")
    key = Key(
        **{name: row[name] for name in names},
        doors=frozenset(row["doors"]),
        allowance=Allowance(row["per_minute"], row["burst"], row["concurrent"]),
    )
    return KnownKey(key, row["version"], row["secret_hash"], row["old_hash"])
