"""Repeat the evidence: `python -m jobs.evidence --scale small`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.evidence.scales import SCALES
from jobs.evidence.stages import Marks, stages
from pipeline.errors import CageError, ConfigurationError

PUBLISHED = Path("docs/assets/evidence")


def run(
    scale: Annotated[str, typer.Option(help=f"One of {', '.join(SCALES)}.")] = "full",
    only: Annotated[
        list[str] | None, typer.Option(help="Stages whose names begin so, and the questions for `results`.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the numbers and charts go.")] = PUBLISHED,
    list_stages: Annotated[bool, typer.Option("--list", help="Name the stages and say which are done.")] = False,
) -> None:
    """Run every stage that is not done, then ask the what-if questions and write numbers and charts."""
    try:
        _run(scale, tuple(only or ()), output, list_stages=list_stages)
    except CageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def _run(name: str, only: tuple[str, ...], output: Path, *, list_stages: bool) -> None:
    if name not in SCALES:
        raise ConfigurationError(f"--scale must be one of {', '.join(SCALES)}; got {name}")
    scale = SCALES[name]
    folder = Path("runs/evidence") / scale.name
    marks = Marks(folder / "_done")
    everything = list(stages(scale, folder))
    known = [stage.name for stage in everything] + ["results"]
    for word in only:
        if not any(each.startswith(word) for each in known):
            raise ConfigurationError(f"--only {word}: no stage begins so; stages: {', '.join(known)}")
    print(f"{scale.name}: {scale.duration}", flush=True)
    for stage in everything:
        if only and not stage.name.startswith(only):
            continue
        done = marks.is_done(stage)
        print(f"{stage.name}: {'done' if done else 'to do'}", flush=True)
        if not (done or list_stages):
            marks.run(stage)
    if not list_stages and (not only or "results".startswith(only)):
        if missing := [stage.name for stage in everything if not marks.is_done(stage)]:
            raise ConfigurationError(f"results need every stage; not done: {', '.join(missing)}")
        _publish(name, folder, output)


def _publish(name: str, folder: Path, output: Path) -> None:
    from jobs.evidence.drawing import draw_answers, draw_questions
    from jobs.evidence.results import ask, ask_again, evaluations, facts, prediction, published, trainings
    from pipeline.advice.recording import RecordedGames

    scale = SCALES[name]
    asked = ask(scale, RecordedGames.load(folder / "games.npz"), folder / "answers") if scale.has_views else {}
    again = ask_again(scale, RecordedGames.load(folder / "games-again.npz")) if scale.again else {}
    judged = list(evaluations(scale, folder))
    found = {
        **facts(scale, folder),
        "trainings": list(trainings(scale, folder)),
        **asked,
        **again,
        "evaluations": judged,
        "prediction": list(prediction(scale, asked, [*judged, *published(scale, PUBLISHED)])),
    }
    output.mkdir(parents=True, exist_ok=True)
    place = output / f"{name}.json"
    place.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")
    if asked:
        draw_questions(scale, asked, output)
    draw_answers(scale, judged, output)
    print(f"written: {place} and the charts beside it")


def _rounded(value: Any) -> Any:
    """Numbers with six digits after the point: nobody reads more, and files stay small."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    typer.run(run)
