"""Sibling projections as one matrix product: the model computes what it did."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.worker.joined_projections import join_projections


@pytest.mark.parametrize(
    ("kind", "num_families"), [("llama", 4), ("qwen2", 4), ("qwen3", 4), ("mistral", 4), ("gpt2", 0)]
)
def test_a_model_computes_the_same_with_joined_projections(tiny, kind, num_families):
    """Two layers with queries, keys and values, and gates; qwen2 has biases; GPT-2 is made with one product."""
    model = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        expected = model(ids).logits
        num_parameters = sum(each.numel() for each in model.parameters())
        assert join_projections(model) == num_families
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert sum(each.numel() for each in model.parameters()) == num_parameters
    assert join_projections(model) == 0


def test_projections_of_other_kinds_are_left_alone():
    class Quantised(torch.nn.Linear):
        pass

    parent = torch.nn.Module()
    parent.gate_proj, parent.up_proj = Quantised(4, 8), torch.nn.Linear(4, 8)
    model = torch.nn.Sequential(parent)
    assert join_projections(model) == 0
    parent.gate_proj = torch.nn.Linear(5, 8)
    assert join_projections(model) == 0
    parent.gate_proj = torch.nn.Linear(4, 8, bias=False)
    assert join_projections(model) == 0
