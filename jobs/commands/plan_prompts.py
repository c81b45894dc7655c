"""What `cage plan` shows of prompts: the first one of the input, as each role reads it."""

from __future__ import annotations

from jobs.commands.text import printable, table
from pipeline.errors import RowError
from pipeline.records import Row
from pipeline.runtime.prompt_preview import PromptPreview, PromptPreviewer, template_notes
from pipeline.runtime.replica_plan import ReplicaPlan
from pipeline.storage.plan import Plan

MAX_SHOWN = 600  # characters of a prompt
MAX_ROWS = 100  # that are looked through for one that can be read


def describe_prompts(plan: Plan, replica: ReplicaPlan) -> str:
    """The prompt of the first row that can be read, for each role: tokens, special tokens and text."""
    lines = [f"note      {printable(note)}" for note in template_notes(replica)]
    row, prompts, reason = _first_prompts(plan, replica)
    if row is None:
        return "\n".join([*lines, f"prompts   none of the first rows can be read: {printable(reason)}"])
    lines += [
        "",
        f"prompts   of row {printable(row.row_id)}" + (f"; rows before it fail: {printable(reason)}" * bool(reason)),
    ]
    rows = [[name, f"{each.num_tokens:,}", _special(each)] for name, each in prompts.items()]
    lines.append(table(["role", "tokens", "special tokens"], rows))
    shown: dict[str, list[str]] = {}
    for name, each in prompts.items():
        shown.setdefault(each.text, []).append(name)
    for text, names in shown.items():
        lines += [f"[{', '.join(names)}]", printable(_shortened(text))]
    return "\n".join(lines)


def _first_prompts(plan: Plan, replica: ReplicaPlan) -> tuple[Row | None, dict[str, PromptPreview], str]:
    """The first row whose prompts can be written, its prompts, and the reason why the first one before it cannot."""
    first_reason = ""
    previewer = PromptPreviewer(replica)
    for number, row in enumerate(plan.read_shard(0)):
        try:
            return row, previewer.prompts(row), first_reason
        except RowError as error:
            first_reason = first_reason or str(error)
        if number + 1 >= MAX_ROWS:
            break
    return None, {}, first_reason


def _special(prompt: PromptPreview) -> str:
    counts = [token if count == 1 else f"{count} x {token}" for token, count in prompt.special_tokens.items()]
    return printable(", ".join(counts)) or "none"


def _shortened(text: str) -> str:
    half = MAX_SHOWN // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]}\n[{left_out:,} characters]\n{text[-half:]}"
