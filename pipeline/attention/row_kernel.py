"""The kernel of `row_attention`, in Triton. Imported where there is a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_one_row(
    query, key, value, keys, values, rows, positions, out,
    scale, window,
    query_head_step, query_row_step, key_head_step, key_row_step, value_head_step, value_row_step,
    cache_row_step, cache_head_step, out_row_step, out_head_step,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, SHARED: tl.constexpr, PADDED_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend for the query heads that share one key-value head of one row; softmax as the blocks come.

    `scale` is in units of log 2; a `window` of 0 is none.
    """
    at = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows + at)
    last = tl.load(positions + at)
    along = tl.arange(0, PADDED_WIDTH)
    is_width = along < WIDTH
    of_head = tl.arange(0, PADDED_SHARED)
    cached = row * cache_row_step + head * cache_head_step

    new_key = tl.load(key + head * key_head_step + at * key_row_step + along, mask=is_width, other=0.0)
    new_value = tl.load(value + head * value_head_step + at * value_row_step + along, mask=is_width, other=0.0)
    tl.store(keys + cached + last * WIDTH + along, new_key, mask=is_width)
    tl.store(values + cached + last * WIDTH + along, new_value, mask=is_width)

    heads = head * SHARED + of_head
    is_head = of_head < SHARED
    is_query = is_head[:, None] & is_width[None, :]
    queries = tl.load(
        query + heads[:, None] * query_head_step + at * query_row_step + along[None, :], mask=is_query, other=0.0
    )
    highest = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    total = tl.full([PADDED_SHARED], 1.0, tl.float32)
    mean = tl.zeros([PADDED_SHARED, PADDED_WIDTH], tl.float32) + new_value.to(tl.float32)[None, :]

    start = tl.where(window > 0, tl.maximum(last + 1 - window, 0), 0)
    for begin in range(start, last, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        is_key = places < last
        block_keys = tl.load(
            keys + cached + places[None, :] * WIDTH + along[:, None],
            mask=is_key[None, :] & is_width[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, block_keys, input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        block_values = tl.load(
            values + cached + places[:, None] * WIDTH + along[None, :],
            mask=is_key[:, None] & is_width[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, 1)
        mean = mean * shrink[:, None] + tl.dot(weights.to(block_values.dtype), block_values, input_precision="ieee")
        highest = higher

    mean = mean / total[:, None]
    tl.store(
        out + at * out_row_step + heads[:, None] * out_head_step + along[None, :],
        mean.to(out.dtype.element_ty),
        mask=is_query,
    )
