"""Attention of running rows on a GPU: the newest token of each over its own keys and values, in one kernel.

Where tokens of one row follow one another in a pass, a kernel stores them before: the programs of a launch have no
order. The kernel that attends is the same one then and stores what is there already, so a token's bits are those of a
pass of its own.

A row's keys are read in place, as many as it has, and its newest key and value are written on the way; torch's own
kernels want rows of one length, or a copy. One program serves one row and key-value head, block by block from the
row's start: its bits do not depend on the batch composition, and lengths may change while the captured pass stays
valid.

R rows of a pass, H query heads, G key-value heads, D head width, L capacity of a cache row.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.attention.plain import AttentionTerms
from pipeline.attention.transfers import on_device

# keys at once, and how a program runs: the fastest of 27 on an H100, whatever the lengths
BLOCK = 32
LAUNCH = {"num_warps": 2, "num_stages": 2}
OLDEST = (8, 0)  # compute capability
LOG2_E = math.log2(math.e)  # the kernel computes powers of 2
_SMALLEST_DOT = 16  # rows of a matrix product


def serves(key: Tensor, value: Tensor) -> bool:
    """Whether the kernel supports the head width and the device of these keys and values."""
    width = key.shape[-1]
    return can_build_for(key.device) and width == value.shape[-1] >= _SMALLEST_DOT


def can_build_for(device: torch.device) -> bool:
    """Whether it is a GPU and kernels for it can be built here."""
    return device.type == "cuda" and what_is_missing(device) is None


@cache
def what_is_missing(device: torch.device) -> str | None:
    """What is missing on this machine to build kernels for a GPU; None: nothing."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < OLDEST:
        return f"a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or later"
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "a C compiler (gcc, say)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h)"
    return None


def attend_rows(
    query_HRD: Tensor,
    key_GRD: Tensor,
    value_GRD: Tensor,
    keys: Tensor,
    values: Tensor,
    rows_R: Tensor,
    last_R: Tensor,
    out_RHD: Tensor,
    terms: AttentionTerms,
) -> None:
    """Write the newest keys and values into the cache, then attend over each row up to its newest token.

    Last dimensions must be contiguous.

    Args:
        query_HRD: of the rows' newest tokens.
        key_GRD: likewise.
        value_GRD: likewise.
        keys: of the layer, [rows, G, L, D].
        values: of the layer, likewise.
        rows_R: the cache row of each row of the pass.
        last_R: the position of each newest token.
        out_RHD: receives the outputs.
        terms: of the layer.
    """
    assert query_HRD.stride(2) == key_GRD.stride(2) == value_GRD.stride(2) == out_RHD.stride(2) == 1
    num_heads, num_rows, width = query_HRD.shape
    num_kv_heads = keys.shape[1]
    scale = width**-0.5 if terms.scale is None else terms.scale
    visibility, sinks = terms.visibility, terms.sinks
    with on_device(query_HRD.device):
        _kernel()[num_rows, num_kv_heads](
            query_HRD, key_GRD, value_GRD, keys, values, rows_R, last_R, out_RHD,
            query_HRD if sinks is None else sinks.float(),  # any pointer: it is not read where there are none
            scale * LOG2_E, (terms.softcap or 0.0) * LOG2_E, visibility.window or 0, visibility.chunk or 0,
            *query_HRD.stride()[:2], *key_GRD.stride()[:2], *value_GRD.stride()[:2],
            *keys.stride()[:2], *out_RHD.stride()[:2],
            **constants(width, num_heads // num_kv_heads),
            HAS_SOFTCAP=terms.softcap is not None, HAS_SINKS=sinks is not None, **LAUNCH,
        )  # fmt: skip


def store_rows(
    key_GRD: Tensor, value_GRD: Tensor, keys: Tensor, values: Tensor, rows_R: Tensor, last_R: Tensor
) -> None:
    """Write the newest keys and values into the cache; arguments as those of `attend_rows`."""
    assert key_GRD.stride(2) == value_GRD.stride(2) == 1
    num_kv_heads, num_rows, width = key_GRD.shape
    with on_device(key_GRD.device):
        _store_kernel()[num_rows, num_kv_heads](
            key_GRD, value_GRD, keys, values, rows_R, last_R,
            *key_GRD.stride()[:2], *value_GRD.stride()[:2], *keys.stride()[:2],
            WIDTH=width, PADDED_WIDTH=1 << (width - 1).bit_length(), num_warps=1,
        )  # fmt: skip


def constants(width: int, num_shared: int) -> dict[str, int]:
    """What the kernel is compiled for: a head width, and how many query heads share a key-value head."""
    return {
        "WIDTH": width,
        "PADDED_WIDTH": 1 << (width - 1).bit_length(),
        "SHARED": num_shared,
        "PADDED_SHARED": max(_SMALLEST_DOT, 1 << (num_shared - 1).bit_length()),
        "BLOCK": BLOCK,
    }


@cache
def _kernel() -> Any:
    """The kernel, imported at its first use: triton comes with torch for GPUs and is not there elsewhere."""
    from pipeline.attention.row_kernel import attend_one_row

    return attend_one_row


@cache
def _store_kernel() -> Any:
    """Likewise."""
    from pipeline.attention.row_kernel import store_one_row

    return store_one_row
