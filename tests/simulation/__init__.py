"""Deterministic simulation: whole runs in one process, on a simulated clock, transport and store.

A seed decides the order of everything that happens and the faults that occur. docs/reliability.md says what is real
here and what is a model.
"""
