"""The export of a large checkpoint: seconds and memory, beside copying and hashing the same bytes."""
