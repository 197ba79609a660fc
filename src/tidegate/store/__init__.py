"""What happened: decisions, kept append-only, with as much of the text as the policy's retention allows."""

from tidegate.store.decisions import KeptDecision, Store, open_store
from tidegate.store.writer import StoreState

__all__ = ["KeptDecision", "Store", "StoreState", "open_store"]
