"""Judging what a run wrote: scores of answers, and the metrics that compare rules."""
