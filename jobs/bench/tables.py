"""Print the measurements of `cage bench solver` as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

HEADINGS = {
    "principals": "J",
    "games_per_second": "games/s",
    "times_published": "x published",
    "median_steps": "steps",
    "ms_per_game": "ms/game",
    "ns_per_number": "ns/number",
    "peak_of_input": "peak / input",
    "median_total_variation": "TV to equilibrium",
    "worst_total_variation": "worst TV",
    "median_deviation_gain": "gain left",
    "worst_deviation_gain": "worst gain",
    "worst_deviation_gain_of_newton": "worst gain of newton",
}


def print_table(measured: dict[str, Any]) -> None:
    """Print all measurements, one table per kind."""
    console = Console()
    console.width = max(console.width, 118)  # narrower tables wrap their numbers
    _print_rows(
        console, "The published solver (L-BFGS-B Jacobi, one core, one game after another)", [measured["published"]]
    )
    _print_rows(console, f"Arm-like games in float64, {measured['threads']} thread(s)", measured["speeds"])
    _print_rows(console, "Full vocabularies in float32", measured["full_vocabulary"])
    if measured["decode_step_ms"] is not None:
        console.print(
            _beside_decoding(measured["full_vocabulary"], measured["decode_shape"], measured["decode_step_ms"])
        )
    if measured["memory"] is not None:
        _print_rows(console, "Peak memory of one solve in float32, on top of its input", [measured["memory"]])
    if measured["sweep"]:
        _print_rows(console, "Games of every kind, values of 0.1 to 100 agent temperatures", measured["sweep"])


def _beside_decoding(full: list[Row], shape: Row, step_ms: float) -> str:
    """Return a line with the time of a decode step, and the solves of its shape as shares of that time."""
    solves = [row for row in full if all(row[name] == size for name, size in shape.items())]
    shares = ", ".join(f"{row['ms'] / step_ms:.0%} at value scale {row['value_scale']:g}" for row in solves)
    step = f"One decode step of SmolLM2-135M's shape, {shape['rows']} rows: {step_ms:.0f} ms"
    return f"{step}; one solve of its vocabulary takes {shares} of that\n"


def _print_rows(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(HEADINGS.get(name, name.replace("_", " ")), justify="right", no_wrap=name == "method")
    for row in rows:
        table.add_row(*(_number(value) for value in row.values()))
    console.print(table)
    console.print()


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
