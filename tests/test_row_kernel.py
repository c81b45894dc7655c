"""The GPU's kernel for running rows, on a CPU: Triton can interpret it. `make kernels` installs Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support import row_kernels
from support.language_models import logits_after, runner_of
from support.row_kernels import check_kernel

from pipeline.attention import rows as row_attention
from pipeline.attention.plain import AttentionTerms
from pipeline.attention.visibility import Visibility

pytest.importorskip("triton", reason="triton is not installed; see `make kernels`")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU tests/test_gpu.py runs the kernel on it"
)


# bfloat16 is left to a GPU: NumPy, with which the interpreter computes, has none
@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize("width", [16, 80])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (9, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_writes_and_attends_as_a_plain_softmax_does(dtype, num_heads, num_kv_heads, width, window):
    terms = AttentionTerms(visibility=Visibility(window))
    check_kernel("cpu", dtype, terms, num_heads=num_heads, num_kv_heads=num_kv_heads, width=width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("extras", [{"softcap": 3.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}])
@pytest.mark.parametrize(
    "visibility", [Visibility(), Visibility(30), Visibility(chunk=48)], ids=["all", "window", "chunk"]
)
def test_the_kernel_knows_softcaps_sinks_and_chunks(dtype, extras, visibility):
    sinks = torch.linspace(-2, 4, 6, device="cpu") if extras.get("sinks") else None
    terms = AttentionTerms(visibility=visibility, softcap=extras.get("softcap"), sinks=sinks)
    check_kernel("cpu", dtype, terms, num_heads=6, num_kv_heads=2, width=16)


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_and_spills_no_register_of_half_types(capability, tmp_path):
    """In a process of its own: where Triton interprets it compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, row_kernels.__file__, str(capability), str(tmp_path)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 12, found.stdout
    for line in lines:
        dtype, shared_bytes, stack_bytes = line.split()
        assert int(shared_bytes) < 99 * 1024  # what the least of the GPUs from 8.0 on have
        assert dtype == "fp32" or int(stack_bytes) == 0


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_runner_that_attends_with_the_kernel_gives_the_logits_of_one_that_does_not(tiny, kind, monkeypatch):
    prompts = [[3, 9, 4], list(range(70)), [7] * 30, [5, 6]]
    plain, fast = (runner_of(tiny(kind), strict=True, num_slots=4, has_fixed_shapes=each) for each in (False, True))
    calls = []
    attend_rows = row_attention.attend_rows
    for places in ({0: 2, 1: 0, 2: 3}, {3: 1, 1: 2}):
        expected = logits_after(plain, places, prompts, num_steps=4)
        with monkeypatch.context() as patch:
            patch.setattr(row_attention, "serves", lambda keys, values: True)
            patch.setattr(
                row_attention, "attend_rows", lambda *args, **kw: calls.append(0) or attend_rows(*args, **kw)
            )
            found = logits_after(fast, places, prompts, num_steps=4)
        for row in places:
            torch.testing.assert_close(found[row], expected[row], atol=1e-4, rtol=0)
    assert len(calls) == 2 * 2 * 5  # two layers, the passes of two calls
