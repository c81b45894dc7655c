"""Folders and object stores: addresses, atomic and create-only writes, retries."""
