"""Judges: answers in, one score per answer out; a higher score is always better.

One file per kind, or per family of kinds, holds the section of the configuration and what scores by it.
`pipeline.evaluation.judges.table` lists the kinds.

To add a judge:

1. Write `pipeline/evaluation/judges/NAME.py` with a subclass of `JudgeConfig` (see `interface.py`): a field
   `kind: Literal["NAME"]`, its options as fields, and `load`, which returns an object with
   `score(answers) -> list[float]`. `PerAnswerJudge` makes one from a function of a single answer.
2. Add the class to `AnyJudge` in `table.py`.

Nothing else dispatches on the kind. Keep the import of the file cheap, since every command imports it to read a
configuration: what needs torch or another large package is imported inside `load`.

A program can also pass a plain Python function where a configuration file has a section; see `function.py`.
"""
