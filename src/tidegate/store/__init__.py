"""What happened: decisions, kept append-only, with as much of the text as the policy's retention allows."""

from tidegate.store.decisions import KeptDecision, Store, open_store
from tidegate.store.keys import Allowance, Key, Keys
from tidegate.store.outbox import Delivery, Outbox, Standing
from tidegate.store.writer import StoreState

__all__ = [
    "Allowance",
    "Delivery",
    "KeptDecision",
    "Key",
    "Keys",
    "Outbox",
    "Standing",
    "Store",
    "StoreState",
    "open_store",
]
