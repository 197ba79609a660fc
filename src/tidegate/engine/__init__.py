"""Many live streams through one model. Sequence, slots and scheduler know no tensors; nothing here knows text."""
