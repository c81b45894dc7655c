"""Files of results: which endings there are, and how tables become CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError

Writers = Mapping[str, Callable[[Any], str]]


def check_outputs(outputs: Sequence[Path], writers: Collection[str]) -> None:
    """Raise ConfigurationError where a file could not be written, before anything is computed."""
    for output in outputs:
        if output.suffix not in writers:
            raise ConfigurationError(f"--output must end with {', '.join(writers)}; got {output}")
        if not output.parent.is_dir():
            raise ConfigurationError(f"--output must be in a folder that exists; {output.parent} does not")


def write_outputs(outputs: Sequence[Path], writers: Writers, found: Any) -> None:
    """Write every file, by its ending. Raises ConfigurationError where one cannot be written."""
    for output in outputs:
        try:
            output.write_text(writers[output.suffix](found), encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"cannot write {output}: {error.strerror}") from None
        print(f"  written   {output}")


def as_json(found: Any) -> str:
    """The results as they are."""
    return json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def as_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line per row."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def as_csv(head: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per row, with empty cells where a row has no value."""
    out = io.StringIO()
    writer = csv.DictWriter(out, head, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the package booktabs, with one column of names and centred numbers."""
    lines = [r"\begin{tabular}{l" + "c" * (len(head) - 1) + "}", r"\toprule"]
    lines += [" & ".join(map(escaped, head)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    words = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
    special = {char: rf"\text{word}{{}}" for char, word in words.items()}
    # a line break in a name would end the paragraph, and the table with it
    return "".join(special.get(char, "\\" + char if char in "&%$#_{}" else char) for char in " ".join(text.split()))
