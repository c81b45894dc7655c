"""Slot cache, prefix reuse, and attention over them."""
