"""One step of decoding: propose, value, solve, draw. The same code for every caller."""
