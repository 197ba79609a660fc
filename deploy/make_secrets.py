"""Make the secrets of compose.yaml in deploy/secrets: for PostgreSQL, fingerprints and the LLM.

    python deploy/make_secrets.py

What is there already stays as it is. Write the LLM's key into upstream_key, where it wants one. Back up
fingerprint_key: without it, decisions are no longer found by subject, and no key of a client is good.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"


def write(name: str, content: str) -> str:
    """Write a secret, unless it is there; returns what is there.

    The folder keeps others out. The file itself can be read by all, because the container's user is another one.
    """
    path = FOLDER / name
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
            file.write(content)
    except FileExistsError:
        return path.read_text()
    sys.stdout.write(f"made {path}\n")
    return content


def main() -> None:
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    password = write("postgres_password", secrets.token_urlsafe(32))
    write("database_url", f"postgresql://tidegate:{password}@postgres/tidegate")
    write("fingerprint_key", secrets.token_hex(32))
    write("upstream_key", "")


if __name__ == "__main__":
    main()
