"""The commands of `cage`, one file each."""
