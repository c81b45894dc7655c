"""The distributed batch pipeline: one run over many machines."""
