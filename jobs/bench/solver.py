"""Measure the equilibrium solver: its speed beside the published solver's, over full vocabularies, and its failures.

A benchmark, not a test: the numbers are those of the machine it runs on.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import cage
from cage.examples import kinds, random_games
from jobs.bench.memory import measure_memory
from jobs.bench.tables import print_table

Row = dict[str, Any]
T = TypeVar("T")

METHODS: dict[str, Any] = {
    "threshold newton": cage.ThresholdNewton(),
    "jacobi": cage.Jacobi(),
    "gauss-seidel": cage.GaussSeidel(),
}
SHAPES = ((1, 2, 50), (32, 2, 50), (256, 2, 50), (2048, 2, 50), (32, 1, 50), (32, 4, 50), (32, 8, 50), (32, 2, 1000))
DECODING_SHAPE = (16, 2, 49_152)  # SmolLM2's vocabulary, beside a decode step of as many rows
# rows double from line to line, then tokens, then principals
GROWING_SHAPES = (
    *((rows, 2, 49_152) for rows in (4, 8, 16, 32, 64)),
    *((16, 2, tokens) for tokens in (12_288, 24_576, 98_304, 151_936)),
    *((16, principals, 49_152) for principals in (1, 4, 8)),
)
SWEPT_ROWS = 32  # most rows for the sweeping methods: a batch takes as long as its slowest row, hundreds of sweeps
SCALES = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the values, in agent temperatures
BENCH_SCALE, FULL_SCALES, GROWING_SCALE = 3.0, (1.0, 3.0), 1.0
PUBLISHED_SWEEPS, PUBLISHED_ITERATIONS = 5, 8


def run_bench_solver(*, quick: bool, games_per_cell: int, threads: int, json_file: Path | None) -> None:
    """Measure games per second, iterations and distance from the equilibrium of every method."""
    measured = run(quick=quick, games_per_cell=games_per_cell, threads=threads)
    print_table(measured)
    if json_file is not None:
        json_file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def run(*, quick: bool = False, games_per_cell: int = 0, threads: int = 1) -> dict[str, Any]:
    """Return all measurements, ready for JSON."""
    torch.set_num_threads(threads)
    repetitions = 1 if quick else 10
    shapes = SHAPES[1:3] if quick else SHAPES
    published = measure_published(2 if quick else 32)
    runs = [
        (name, shape) for shape in shapes for name in METHODS if name == "threshold newton" or shape[0] <= SWEPT_ROWS
    ]
    speeds = [measure_speed(name, shape, repetitions, published) for name, shape in runs]
    full = [measure_full_vocabulary(DECODING_SHAPE, scale, repetitions) for scale in FULL_SCALES]
    growing = () if quick else GROWING_SHAPES
    full += [measure_full_vocabulary(shape, GROWING_SCALE, repetitions) for shape in growing]
    return {
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "threads": threads,
        "value_scale": BENCH_SCALE,
        "published": published,
        "speeds": speeds,
        "full_vocabulary": full,
        "decode_step_ms": None if quick else measure_decode_step(num_rows=DECODING_SHAPE[0]),
        "decode_shape": _shape_row(DECODING_SHAPE),
        "memory": None if quick else measure_memory(),
        "sweep": sweep_cells(games_per_cell) if games_per_cell else [],
    }


def measure_speed(name: str, shape: tuple[int, int, int], repetitions: int, published: Row) -> Row:
    """Time one method on one shape of arm-like games in float64."""
    game = _games("arm-like", shape, torch.float64)
    seconds, solution = _timed(lambda: METHODS[name].solve(game), repetitions)
    games_per_second = shape[0] / seconds
    return _shape_row(shape) | {
        "method": name,
        "games_per_second": games_per_second,
        "times_published": games_per_second / published["games_per_second"],
        "median_steps": solution.num_steps.double().median().item(),
        "most_steps": solution.num_steps.max().item(),
        "worst_residual": solution.residual.max().item(),
        "converged": (solution.status == cage.Status.CONVERGED).double().mean().item(),
    }


def measure_full_vocabulary(shape: tuple[int, int, int], scale: float, repetitions: int) -> Row:
    """Time the default method over a full vocabulary in float32."""
    game = _games("arm-like", shape, torch.float32, scale)
    seconds, solution = _timed(lambda: cage.solve(game), repetitions)
    return _shape_row(shape) | {
        "value_scale": scale,
        "ms": seconds * 1e3,
        "ns_per_number": seconds * 1e9 / math.prod(shape),
        "median_steps": solution.num_steps.double().median().item(),
        "worst_residual": solution.residual.max().item(),
        "converged": (solution.status == cage.Status.CONVERGED).double().mean().item(),
    }


def measure_decode_step(num_rows: int, context: int = 128, repetitions: int = 5) -> float:
    """Return the milliseconds of one decode step of a model of SmolLM2-135M's shape (random weights)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.inference_mode():
        cache = model(torch.ones(num_rows, context, dtype=torch.long), use_cache=True).past_key_values
        token = torch.ones(num_rows, 1, dtype=torch.long)
        seconds, _ = _timed(partial(model, token, past_key_values=cache), repetitions)
    return seconds * 1e3


def measure_published(num_games: int) -> Row:
    """Time the published solver one game after another, and measure how far from the equilibrium it ends."""
    game = _games("arm-like", (num_games, 2, 50), torch.float64)
    timed = [_timed(partial(solve_as_published, game, row), 2) for row in range(num_games)]
    seconds = sum(game_seconds for game_seconds, _ in timed)
    offers = torch.stack([offer for _, offer in timed])
    policy = torch.softmax(game.base_logprobs + offers.sum(1), -1)
    gain = cage.deviation_gain(game, PublishedAnswer(offers))
    distance = 0.5 * (policy - cage.solve(game).policy).abs().sum(1)
    exact_gain = cage.deviation_gain(game, cage.solve(game))
    return _shape_row((num_games, 2, 50)) | {
        "games_per_second": num_games / seconds,
        "ms_per_game": seconds / num_games * 1e3,
        "median_total_variation": distance.median().item(),
        "worst_total_variation": distance.max().item(),
        "median_deviation_gain": gain.amax(1).median().item(),
        "worst_deviation_gain": gain.max().item(),
        "worst_deviation_gain_of_newton": exact_gain.max().item(),
    }


@dataclass(frozen=True, slots=True)
class PublishedAnswer:
    """The offers [B, J, V] that the published solver ends with; it has no thresholds."""

    incentives: torch.Tensor


def solve_as_published(game: cage.Game, row: int) -> torch.Tensor:
    """Return the offers [J, V] of nonlinear Jacobi with SciPy's L-BFGS-B and numerical gradients (CAGE, Algorithm 1).

    Every principal maximises its own utility over 0 <= y_j <= v_j - min v_j against the others' previous offers.
    """
    import numpy as np
    from scipy.optimize import minimize

    base, values = game.base_logprobs[row].numpy(), game.values[row].numpy()
    price = 1.0 / game.row_temperatures[row].item()
    offers = np.zeros_like(values)

    def loss(offer: Any, others: Any, value: Any) -> float:
        logits = base + (others + offer) * price
        weights = np.exp(logits - logits.max())
        return -float(weights @ (value - offer) / weights.sum())

    for _ in range(PUBLISHED_SWEEPS):
        previous = offers.copy()
        for j, value in enumerate(values):
            others = previous.sum(0) - previous[j]
            bounds = [(0.0, high) for high in value - value.min()]
            options = {"maxiter": PUBLISHED_ITERATIONS}
            found = minimize(loss, previous[j], (others, value), method="L-BFGS-B", bounds=bounds, options=options)
            offers[j] = found.x
    return torch.from_numpy(offers)


def sweep_cells(games_per_cell: int, shapes: tuple[tuple[int, int], ...] | None = None) -> list[Row]:
    """Solve games of every kind and value scale, games_per_cell for each number of principals, tokens and type."""
    shapes = shapes or tuple((j, v) for v in (2, 50, 1000) for j in range(1, 9))
    types = ((torch.float64, 1e-9), (torch.float32, 1e-4))
    return [_sweep_cell(games_per_cell, *shape, dtype, tol) for shape in shapes for dtype, tol in types]


def _sweep_cell(num_games: int, num_principals: int, num_tokens: int, dtype: torch.dtype, tol: float) -> Row:
    batches = [(kind, scale) for kind in kinds for scale in SCALES]
    num_rows = -(-num_games // len(batches))
    worst, unsolved, steps, nans, start = 0.0, 0, [], 0, time.perf_counter()
    for seed, (kind, scale) in enumerate(batches):
        shape = (num_rows, num_principals, num_tokens)
        solution = cage.ThresholdNewton(tol=tol).solve(_games(kind, shape, dtype, scale, seed))
        worst = max(worst, solution.residual.max().item())
        unsolved += int((solution.status != cage.Status.CONVERGED).sum())
        nans += int(torch.isnan(solution.log_policy).any(1).sum() + torch.isnan(solution.thresholds).any(1).sum())
        steps.append(solution.num_steps)
    return _shape_row((num_rows * len(batches), num_principals, num_tokens)) | {
        "type": str(dtype).removeprefix("torch."),
        "unsolved": unsolved,
        "rows_with_nan": nans,
        "worst_residual": worst,
        "median_steps": torch.cat(steps).double().median().item(),
        "most_steps": int(torch.cat(steps).max()),
        "seconds": time.perf_counter() - start,
    }


def _games(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, scale: float = BENCH_SCALE, seed: int = 0
) -> cage.Game:
    rows, principals, tokens = shape
    return random_games(
        kind, num_rows=rows, num_principals=principals, num_tokens=tokens, value_scale=scale, seed=seed, dtype=dtype
    )


def _timed(call: Callable[[], T], repetitions: int) -> tuple[float, T]:
    """Return the seconds of the fastest of some calls, and the result of the last.

    The fastest, as timeit reports it: other processes on the machine can only make a call slower.
    """
    times = []
    for _ in range(max(2, repetitions)):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return min(times), result


def _shape_row(shape: tuple[int, int, int]) -> Row:
    return dict(zip(("rows", "principals", "tokens"), shape, strict=True))
