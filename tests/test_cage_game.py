"""What a game accepts, and the message for what it refuses."""

import pickle

import pytest
import torch

import cage

BASE = torch.zeros(3, 5)
VALUES = torch.zeros(3, 2, 5)


@pytest.mark.parametrize(
    ("base", "values", "temperature", "message"),
    [
        (BASE[0], VALUES, 1.0, r"base_logprobs must be \[rows, tokens\]; got shape \(5,\)"),
        (BASE, VALUES[0], 1.0, r"values must be \[rows, principals, tokens\]; got shape \(2, 5\)"),
        (BASE, VALUES[:2], 1.0, r"rows and tokens of base_logprobs \(3, 5\); got \(2, 2, 5\)"),
        (BASE, VALUES[..., :4], 1.0, r"rows and tokens of base_logprobs \(3, 5\); got \(3, 2, 4\)"),
        (BASE[:, :0], VALUES[..., :0], 1.0, r"at least one token; got shape \(3, 0\)"),
        (BASE.long(), VALUES, 1.0, r"base_logprobs must be float16, .*; got torch.int64"),
        (BASE.tolist(), VALUES, 1.0, r"base_logprobs must be a tensor; got list"),
        (BASE, VALUES.double(), 1.0, r"type of base_logprobs, torch.float32; got torch.float64"),
        (BASE, VALUES.to("meta"), 1.0, r"device of base_logprobs, cpu; got meta"),
        (BASE, VALUES, 0.0, r"agent_temperature must be positive and finite; got 0.0"),
        (BASE, VALUES, -1.0, r"agent_temperature must be positive and finite; got -1.0"),
        (BASE, VALUES, float("nan"), r"agent_temperature must be positive and finite; got nan"),
        (BASE, VALUES, torch.tensor([1.0, -2.0, 1.0]), r"agent_temperature must be positive and finite; got -2.0"),
        (BASE, VALUES, [1.0, 2.0, 1.0], r"a number, or a tensor with one entry per row; got list"),
        (BASE, VALUES, "1.0", r"a number, or a tensor with one entry per row; got str"),
        (BASE, VALUES, torch.ones(2), r"a number or one per row \[3\]; got \(2,\)"),
    ],
)
def test_a_game_that_does_not_fit_names_what_it_got(base, values, temperature, message):
    with pytest.raises(ValueError, match=message):
        cage.Game(base, values, temperature)


@pytest.mark.parametrize(
    "method", [cage.ThresholdNewton(), cage.FixedStepNewton(), cage.Jacobi(), cage.GaussSeidel()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_that_require_gradients_are_solved_as_others_are(method, dtype):
    torch.manual_seed(0)
    base, values, temperature = (
        torch.randn(3, 5).to(dtype),
        torch.randn(3, 2, 5).to(dtype),
        torch.ones(3, dtype=dtype),
    )
    expected = method.solve(cage.Game(base, values, temperature)).policy
    tensors = [tensor.requires_grad_() for tensor in (base, values, temperature)]
    found = method.solve(cage.Game(*tensors)).policy
    assert not found.requires_grad
    assert torch.equal(found, expected)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_types_become_float32_and_wider_types_stay(half):
    assert cage.Game(BASE.to(half), VALUES.to(half), 1.0).values.dtype == torch.float32
    assert cage.Game(BASE.to(half), VALUES, 1.0).base_logprobs.dtype == torch.float32
    assert cage.Game(BASE.double(), VALUES.double(), 1.0).values.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [5, 5000])
def test_a_solution_has_the_type_of_its_game(dtype, num_tokens):
    game = cage.Game(torch.zeros(3, num_tokens, dtype=dtype), torch.rand(3, 2, num_tokens, dtype=dtype), 0.1)
    solution = cage.solve(game)
    for name in ("policy", "log_policy", "thresholds", "utilities", "residual", "incentives"):
        assert getattr(solution, name).dtype == dtype, name
    assert solution.incentives.shape == game.values.shape
    assert solution.status.tolist() == [cage.Status.CONVERGED] * 3


@pytest.mark.parametrize("method", [cage.ThresholdNewton(), cage.Jacobi(), cage.GaussSeidel()])
def test_without_principals_the_base_stays(method):
    base = torch.randn(4, 7, dtype=torch.float64)
    solution = method.solve(cage.Game(base, base.new_zeros(4, 0, 7), 1.0))
    assert torch.allclose(solution.policy, torch.softmax(base, -1))
    assert solution.thresholds.shape == (4, 0)
    assert solution.residual.tolist() == [0.0] * 4
    assert cage.deviation_gain(solution.game, solution).shape == (4, 0)


def test_a_batch_without_rows_has_a_solution_without_rows():
    for num_principals in (0, 1, 2, 3):
        for num_tokens in (4, 5000):
            solution = cage.solve(
                cage.Game(torch.zeros(0, num_tokens), torch.zeros(0, num_principals, num_tokens), 1.0)
            )
            assert solution.policy.shape == (0, num_tokens)
            assert solution.thresholds.shape == (0, num_principals)


def test_one_temperature_per_row_is_that_row_s():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    values = 3 * torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    temperatures = torch.tensor([0.5, 1.0, 2.0])
    together = cage.solve(cage.Game(base, values, temperatures))
    for row, temperature in enumerate(temperatures.tolist()):
        alone = cage.solve(cage.Game(base[row : row + 1], values[row : row + 1], temperature))
        assert torch.equal(alone.thresholds[0], together.thresholds[row])


def test_a_solution_survives_pickling():
    solution = cage.solve(cage.Game(BASE, VALUES, 1.0))
    again = pickle.loads(pickle.dumps(solution))
    assert torch.equal(again.policy, solution.policy)


def test_the_core_imports_torch_and_the_standard_library_only():
    import subprocess
    import sys

    heavy = (
        "numpy.testing",
        "scipy",
        "ray",
        "transformers",
        "pyarrow",
        "pydantic",
        "typer",
        "rich",
        "pipeline",
        "jobs",
    )
    code = (
        "import cage, cage.examples, sys; [getattr(cage, name) for name in cage.__all__]; "
        f"print('torch' in sys.modules, [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


def test_public_names_are_listed_and_a_wrong_one_is_an_attribute_error():
    assert set(cage.__all__) <= set(dir(cage))
    with pytest.raises(AttributeError, match="module 'cage' has no attribute 'Equilibrium'"):
        _ = cage.Equilibrium
