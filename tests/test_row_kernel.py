"""The GPU's kernel for running rows, on a CPU: Triton can interpret it. `make kernels` installs Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support import row_kernels
from support.language_models import load_in_slots, logits_after, runner_of, spec_of
from support.row_kernels import check_following, check_kernel

from pipeline.attention import rows as row_attention
from pipeline.attention.plain import AttentionTerms
from pipeline.attention.visibility import Visibility
from pipeline.protocol import messages
from pipeline.protocol.messages import Admission, Draft, Step
from pipeline.protocol.specs import Drafts

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


@pytest.mark.parametrize("terms", [AttentionTerms(), AttentionTerms(visibility=Visibility(3), softcap=3.0)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "width"), [(4, 4, 16), (9, 3, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_that_follow_one_another_in_a_pass_get_the_bits_of_passes_of_their_own(
    dtype, num_heads, num_kv_heads, width, terms
):
    check_following("cpu", dtype, terms, num_heads=num_heads, num_kv_heads=num_kv_heads, width=width)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.nightly), 90])
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


@pytest.fixture
def few_rows(monkeypatch):
    """The interpreter takes a while for each row."""
    monkeypatch.setattr(messages, "PASS_ROWS", 16)


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.nightly), "mistral"])
def test_a_runner_that_attends_with_the_kernel_gives_the_logits_of_one_that_does_not(
    tiny, kind, few_rows, monkeypatch
):
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


def test_drafted_tokens_have_the_bits_of_tokens_one_after_another(tiny, few_rows, monkeypatch):
    """With the kernel, in passes of one shape; a free slot's number and a lane are where their logits are kept."""
    spec = replace(spec_of(tiny(), num_slots=4), drafts=Drafts.ANYWHERE)
    one_by_one, drafting = (load_in_slots(spec, has_fixed_shapes=True) for _ in range(2))
    monkeypatch.setattr(row_attention, "serves", lambda keys, values: True)
    texts = {0: [3, 9, 4, 8, 8, 7], 2: [*range(40, 75)]}
    admissions = [Admission(slot, {"a": text, "b": text[1:]}) for slot, text in texts.items()]
    tokens, wrong = {0: [11, 12, 13, 14], 2: [21, 22, 23, 24]}, [90, 91]
    found = {}
    for runner in (one_by_one, drafting):
        runner.advance(Step(admissions))
    for step in range(4):
        one_by_one.advance(Step((), [0, 2], [tokens[0][step], tokens[2][step]]))
        found[step] = one_by_one.logprobs_at([0, 2], None).clone()
    # of slot 2 one token is right
    drafts = [Draft(0, tokens[0][1:3], [1, 4]), Draft(2, [tokens[2][1], *wrong], [3, 5, 6])]
    drafting.advance(Step((), [0, 2], [tokens[0][0], tokens[2][0]], {}, drafts))
    logprobs = drafting.logprobs_at([0, 1, 4, 2, 3], None)
    expected = [found[0][0], found[1][0], found[2][0], found[0][1], found[1][1]]
    assert all(map(torch.equal, logprobs, expected))
    drafting.advance(Step((), [0], [tokens[0][3]], {0: 2}))
    assert torch.equal(drafting.logprobs_at([0], None)[0], found[3][0])
    drafting.advance(Step((), [2], [tokens[2][2]], {2: 1}))  # over what was wrong
    assert torch.equal(drafting.logprobs_at([2], None)[0], found[2][1])
