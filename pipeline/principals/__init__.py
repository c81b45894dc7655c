"""The kinds of principals, one file each."""
