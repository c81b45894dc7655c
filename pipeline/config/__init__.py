"""The configuration: typed sections, files and overrides, variants."""
