"""Decoding: rows in, records out; free of Ray."""
