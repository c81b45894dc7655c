"""Training data out of a run: answers filtered, paired, split by prompt and written with a card."""
