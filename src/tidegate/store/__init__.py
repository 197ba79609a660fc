"""What happened: decisions, kept append-only, with as much of the text as the policy's retention allows."""

from tidegate.store.decisions import KeptDecision, Store, open_store
from tidegate.store.keys import Allowance, Key, Keys
from tidegate.store.writer import StoreState

__all__ = ["Allowance", "KeptDecision", "Key", "Keys", "Store", "StoreState", "open_store"]
