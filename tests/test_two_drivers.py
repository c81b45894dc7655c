"""A driver takes over what another one committed in the meantime, instead of decoding it again."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

from support.failpoints import Failpoint, watched
from support.runs import job, parts, run_job, write_prompts

from pipeline.config.sections import Config
from pipeline.stages.relabel import relabel


@dataclass
class Overtaken:
    """Counts the rows that its driver prefills; another driver does the whole run when the first shard is there."""

    config: Config
    folder: Path
    num_rows: int = 0
    others: list[int] = field(default_factory=list)

    def __call__(self, point: Failpoint, detail: object) -> None:
        if point is Failpoint.MID_PREFILL:
            self.num_rows += len(detail)
        if point is Failpoint.AFTER_COMMIT and not self.others:
            other = Overtaken(self.config, self.folder, others=[0])
            run_job(self.config, self.folder, watch=other)
            self.others.append(other.num_rows)


def test_a_driver_that_is_overtaken_decodes_nothing_that_is_committed(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 15)
    lines = prompts.read_text().splitlines()
    lines[13] = '{"id": "r13", "prompt": null}'
    prompts.write_text("\n".join(lines) + "\n")
    options = {
        "cluster": {"slots": 2},
        "errors": {"budget": 1},
    }  # a failed row that counted twice would be too many
    config = job(prompts, tmp_path / "run", tiny(), **options)
    watch, out = Overtaken(config, tmp_path), io.StringIO()
    run, was_run = relabel(config, tmp_path / "cache", out, wiring=watched(watch))
    assert was_run
    assert watch.others == [11]  # all but the first shard and the failed row
    assert watch.num_rows <= 6  # the first shard, and the second that was under way
    assert "15/15 rows  5/5 shards" in out.getvalue().splitlines()[-1]
    assert (run.status().rows_aligned, run.status().rows_failed) == (14, 1)
    run_job(job(prompts, tmp_path / "whole", tiny(), **options), tmp_path)
    assert parts(tmp_path / "run") == parts(tmp_path / "whole")
