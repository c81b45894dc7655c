"""The coordinator's side: rows in, records out, on any transport."""
