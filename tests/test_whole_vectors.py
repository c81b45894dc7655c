"""Activations and narrow products: the same bits wherever a row stands in its tensor, and the values of torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pipeline.attention.branches import Reading, RowCache
from pipeline.attention.prefixes import Prompt
from pipeline.hub.token_bytes import ByteIndex
from pipeline.worker.branch_rows import BranchRow
from pipeline.worker.head_scorer import HeadRequest, RoleHead
from pipeline.worker.text_scorer import TextScorer
from pipeline.worker.whole_vectors import WholeVectors, detect_partial_vectors

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda x: x.clone().sigmoid_(),
    "silu": functional.silu,
    "softplus": functional.softplus,
    "mish": functional.mish,
    "elu": functional.elu,
    "celu": functional.celu,
    "selu": functional.selu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "exp2": torch.exp2,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "power": lambda x: x.abs() ** 1.5,
    "power of a number": lambda x: 2.0**x,
}


def rows_of(width):
    return 3 * torch.randn(67, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 5, 24, 100])
def test_an_activation_of_a_row_is_its_own(name, width):
    activation, numbers = ACTIVATIONS[name], rows_of(width)
    half = torch.cat([numbers, -numbers], -1)[:, :width]  # with gaps, as half of a gated layer is
    with WholeVectors():
        expected = activation(numbers)
        for start, stop in ((0, 1), (1, 4), (7, 15), (33, 66)):
            assert torch.equal(activation(numbers[start:stop]), expected[start:stop])
            assert torch.equal(activation(half[start:stop]), expected[start:stop])
    torch.testing.assert_close(expected, activation(numbers))
    with detect_partial_vectors() as detector:
        activation(numbers)
    assert detector.found


@pytest.mark.parametrize("num_outputs", [1, 2, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_a_row_is_its_own_for_one_output_and_for_one_row(num_outputs, bias):
    states = rows_of(96)
    layer = torch.nn.Linear(96, num_outputs, bias=bias).requires_grad_(False)
    with WholeVectors():
        expected = layer(states)
        for start, stop in ((0, 1), (5, 7), (1, 9), (20, 67)):
            assert torch.equal(layer(states[start:stop]), expected[start:stop])
            assert torch.equal(layer(states[None, start:stop])[0], expected[start:stop])
    torch.testing.assert_close(expected, layer(states))
    with detect_partial_vectors() as detector:
        layer(states)
    assert detector.found == (num_outputs == 1)


def test_a_product_by_the_operator_is_its_own_from_one_row_on():
    states, matrix = rows_of(64), rows_of(67).t().contiguous()[:64].contiguous()
    with WholeVectors():
        expected = states @ matrix
        for stop in (1, 2, 3, 4, 9):
            assert torch.equal(states[:stop] @ matrix, expected[:stop])


def test_what_fills_whole_vectors_needs_no_care():
    with detect_partial_vectors() as detector:
        functional.silu(rows_of(128))
        functional.linear(rows_of(64), torch.ones(3, 64))
        rows_of(5).tanh()
        rows_of(5) ** 2
    assert not detector.found


@torch.inference_mode()
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_score_has_the_same_bits_however_many_tokens_were_read_with_its_own(outputs):
    """A row that goes on after a kill reads its whole answer at once, and read it token by token before."""
    head, states = torch.nn.Linear(768, outputs), rows_of(768)
    with WholeVectors():
        wanted = head(states)[:, 0]
    for count in (*range(1, 20), 67):
        row = BranchRow(Prompt.of(None, [1], 0), [], 0)
        reading = Reading(RowCache(), 0, list(range(count)))
        found = HeadRequest(row, RoleHead(head, 0), reading, list(range(count))).finish(states[:count])
        assert torch.equal(found, wanted[:count]), count


@torch.inference_mode()
def test_logits_of_a_place_have_the_same_bits_however_many_places_are_asked_for():
    head, states = torch.nn.Linear(768, 5000), rows_of(768)
    scorer = TextScorer(lambda states, adapter: head(states), ByteIndex((), (), ()), torch.device("cpu"))
    wanted = scorer.logits(states, 0)
    for count in (1, 2, 3, 5, 9):
        assert torch.equal(scorer.logits(states[:count], 0), wanted[:count]), count
