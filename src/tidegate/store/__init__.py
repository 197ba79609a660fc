"""What happened: decisions, kept append-only, with as much of the text as the policy's retention allows."""

from tidegate.store.decisions import KeptDecision, Store, open_store

__all__ = ["KeptDecision", "Store", "open_store"]
