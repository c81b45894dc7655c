"""What `cage plan` shows of prompts: the first one of the input, as each role reads it."""

from __future__ import annotations

from itertools import islice

from jobs.commands.text import printable, table
from pipeline.errors import RowError
from pipeline.records import Row
from pipeline.runtime.prompt_preview import PromptPreview, PromptPreviewer, template_notes
from pipeline.runtime.replica_plan import ReplicaPlan
from pipeline.storage.plan import Plan

MAX_SHOWN = 600  # characters of a prompt
MAX_ROWS = 100  # that are looked through for one that can be read, and for how rows fit into contexts
MAX_SHARDS = 20  # that they are taken from


def describe_prompts(plan: Plan, replica: ReplicaPlan) -> str:
    """The prompt of the first row that can be read, for each role: tokens, special tokens and text."""
    lines = [f"note      {printable(note)}" for note in template_notes(replica)]
    previewer = PromptPreviewer(replica)
    row, prompts, reason = _first_prompts(plan, previewer)
    if row is None:
        return "\n".join([*lines, f"prompts   none of the first rows can be read: {printable(reason)}"])
    lines += [f"note      {printable(note)}" for note in previewer.start_notes(row)]
    lines += [
        f"context   {printable(describe_context(plan, replica, previewer))}",
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


def describe_context(plan: Plan, replica: ReplicaPlan, previewer: PromptPreviewer) -> str:
    """How many of some rows fail, have no place for a whole answer in a context, or have an answer that does not fit.

    The rows are the first of shards all over the run.
    """
    limit = replica.config.decoding.max_new_tokens
    num_rows, fits, first_reason = 0, [], ""
    stride = -(-len(plan.shards) // MAX_SHARDS)
    chosen = plan.shards[::stride]
    for shard in chosen:
        for row in islice(plan.read_shard(shard.index), -(-MAX_ROWS // len(chosen))):
            num_rows += 1
            try:
                fits.append((previewer.fit(row), min(limit, row.max_new_tokens or limit)))
            except RowError as error:
                first_reason = first_reason or str(error)
    cut = sum(fit.left is not None and fit.left < wanted for fit, wanted in fits)
    uncompared = sum(fit.left is not None and fit.existing > fit.left for fit, _ in fits)
    looked = f"all {num_rows:,} rows" if num_rows == plan.num_rows else f"{num_rows:,} rows from all over the input"
    if not (first_reason or cut or uncompared):
        return f"{looked} fit, with max_new_tokens ({limit:,})"
    failed = num_rows - len(fits)
    found = {
        f"fail, the first because {first_reason}": failed,
        f"have less than max_new_tokens ({limit:,}) left in some context, so their answers may be cut": cut,
        "have an existing answer that does not fit into some context and is not compared": uncompared,
    }
    return f"of {looked} " + "; ".join(
        f"{count:,} ({100 * count / num_rows:.0f} %) {what}" for what, count in found.items() if count
    )


def _first_prompts(plan: Plan, previewer: PromptPreviewer) -> tuple[Row | None, dict[str, PromptPreview], str]:
    """The first row whose prompts can be written, its prompts, and the reason why the first one before it cannot."""
    first_reason = ""
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
