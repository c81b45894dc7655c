"""The host's side: one model on one device."""
