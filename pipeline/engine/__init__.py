"""The coordinator's side: rows in, records out, whatever runs the hosts."""
