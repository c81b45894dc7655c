"""The kernel for running rows: beside a plain softmax, wherever it runs; compiled for GPUs that need not be there.

The second is `python tests/support/row_kernels.py CAPABILITY FOLDER`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.attention.plain import AttentionTerms
from pipeline.attention.rows import LAUNCH, attend_rows, constants, store_rows

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LENGTHS, ROWS = (1, 2, 64, 65, 129, 256), (5, 0, 2, 6, 1, 3)


def check_kernel(
    device: str,
    dtype: torch.dtype,
    terms: AttentionTerms,
    *,
    num_heads: int,
    num_kv_heads: int,
    width: int,
) -> None:
    """Rows of several lengths are written and attended for as in float64; no other number of the cache changes."""
    torch.manual_seed(0)
    shape = (7, num_kv_heads, 256, width)
    keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    last_R = torch.tensor(LENGTHS, device=device) - 1
    query, key, value = (
        torch.randn(len(ROWS), heads, width, device=device, dtype=dtype).transpose(0, 1)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    expected_keys, expected_values = keys.clone(), values.clone()
    out = torch.full((len(ROWS), num_heads, width), torch.nan, device=device, dtype=dtype)
    attend_rows(query, key, value, keys, values, torch.tensor(ROWS, device=device), last_R, out, terms)
    for at, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        expected_keys[row, :, length - 1], expected_values[row, :, length - 1] = key[:, at], value[:, at]
        expected = plain_softmax(
            query[:, at].double(),
            expected_keys[row, :, :length].double(),
            expected_values[row, :, :length].double(),
            terms,
        )
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(out[at].double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


def check_following(
    device: str, dtype: torch.dtype, terms: AttentionTerms, *, num_heads: int, num_kv_heads: int, width: int
) -> None:
    """Tokens of a row that follow one another in a pass, in any order of its rows, and rows beside them get the bits
    that they get one after another, in the outputs and in the cache."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    cached = [numbers(7, num_kv_heads, 256, width) for _ in range(2)]
    places = [(row, at) for row, first in ((5, 64), (2, 31), (0, 0)) for at in range(first, first + 5)] + [(6, 200)]
    states = [numbers(len(places), heads, width).transpose(0, 1) for heads in (num_heads, num_kv_heads, num_kv_heads)]

    def attend(order: Sequence[int], buffers: Sequence[Tensor], *, together: bool) -> Tensor:
        out = torch.full((len(places), num_heads, width), torch.nan, device=device, dtype=dtype)
        for chosen in [list(order)] if together else [[at] for at in order]:
            rows_R, last_R = torch.tensor([places[at] for at in chosen], device=device).T.contiguous()
            query, key, value = (each[:, chosen] for each in states)
            if together:
                store_rows(key, value, *buffers, rows_R, last_R)
            of_chosen = out[chosen]
            attend_rows(query, key, value, *buffers, rows_R, last_R, of_chosen, terms)
            out[chosen] = of_chosen
        return out

    one_by_one = [each.clone() for each in cached]
    expected = attend(range(len(places)), one_by_one, together=False)
    for order in (range(len(places)), range(len(places) - 1, -1, -1)):
        buffers = [each.clone() for each in cached]
        assert torch.equal(attend(order, buffers, together=True), expected)
        assert all(map(torch.equal, buffers, one_by_one))


def plain_softmax(query_HD: Tensor, keys_GLD: Tensor, values_GLD: Tensor, terms: AttentionTerms) -> Tensor:
    """Attention [H, D] of one query at the end of its row, written out."""
    (num_heads, width), (num_kv_heads, length, _) = query_HD.shape, keys_GLD.shape
    first = terms.visibility.first_key(length - 1)
    keys_HLD, values_HLD = (
        each[:, first:].repeat_interleave(num_heads // num_kv_heads, 0) for each in (keys_GLD, values_GLD)
    )
    scale = width**-0.5 if terms.scale is None else terms.scale
    scores_HL = (keys_HLD @ query_HD[..., None])[..., 0] * scale
    if terms.softcap is not None:
        scores_HL = terms.softcap * (scores_HL / terms.softcap).tanh()
    total_H = scores_HL.logsumexp(-1)
    if terms.sinks is not None:
        total_H = torch.logaddexp(total_H, terms.sinks.double())
    shares_HL: Tensor = (scores_HL - total_H[:, None]).exp()
    return (shares_HL[:, None] @ values_HLD)[:, 0]


def compile_for(capability: int, folder: Path) -> None:
    """Print a line for each kernel: its type, and the bytes of shared memory and of stack that it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.attention.row_kernel import attend_one_row

    for dtype in ("bf16", "fp16", "fp32"):
        for width, num_shared in ((64, 3), (128, 4)):
            for has_extras in (False, True):
                chosen = {
                    **constants(width, num_shared),
                    "HAS_SOFTCAP": has_extras,
                    "HAS_SINKS": has_extras,
                }
                types = dict.fromkeys(("query", "key", "value", "keys", "values", "out"), f"*{dtype}")
                types |= {"rows": "*i64", "positions": "*i64", "sinks": "*fp32", "scale": "fp32", "softcap": "fp32"}
                types |= dict.fromkeys(chosen, "constexpr")
                signature = {name: types.get(name, "i32") for name in attend_one_row.arg_names}
                # buffers and steps of such widths are multiples of 16 numbers, and loaded as vectors
                aligned = [
                    at for at, name in enumerate(signature) if name.endswith("step") or signature[name][0] == "*"
                ]
                attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
                source = ASTSource(attend_one_row, signature, constexprs=chosen, attrs=attributes)
                kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(LAUNCH))
                binary = folder / "kernel.cubin"
                binary.write_bytes(kernel.asm["cubin"])
                reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
                usage = subprocess.run(
                    [reader, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
                )
                [stack] = re.findall(r"STACK:(\d+)", usage.stdout)
                print(dtype, kernel.metadata.shared, stack)


if __name__ == "__main__":
    compile_for(int(sys.argv[1]), Path(sys.argv[2]))
