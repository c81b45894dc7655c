"""Principals out of preference data: pairs in, LoRA adapters and a report out."""
