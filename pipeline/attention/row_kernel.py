"""The kernel of `row_attention`, in Triton. Imported where there is a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _capped(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap tanh(scores / softcap), where there is one."""
    if HAS_SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores


@triton.jit
def _first_key(last, window, chunk):
    """The first position that the row's query sees."""
    start = tl.where(window > 0, tl.maximum(last + 1 - window, 0), 0)
    if chunk > 0:
        start = tl.maximum(start, last - last % chunk)
    return start


@triton.jit
def _load_block(cached, places, along, last, WIDTH: tl.constexpr):
    """A row's keys or values at some places before its newest token; 0 elsewhere."""
    return tl.load(cached + places * WIDTH + along, mask=(places < last) & (along < WIDTH), other=0.0)


@triton.jit
def _with_sink(own, mean, sink):
    """Begin the softmax with a sink beside the row's own key: highest score, sum of weights, weighted mean."""
    highest = tl.maximum(own, sink)
    share = tl.exp2(own - highest)
    return highest, share + tl.exp2(sink - highest), mean * share[:, None]


@triton.jit
def _with_block(highest, total, mean, scores, block_values):
    """Add a block of keys to the softmax.

    What was summed so far is scaled to the new highest score, so that no power of 2 overflows whatever the scores.
    """
    higher = tl.maximum(highest, tl.max(scores, 1))
    shrink = tl.exp2(highest - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    mean = mean * shrink[:, None] + tl.dot(weights.to(block_values.dtype), block_values, input_precision="ieee")
    return higher, total, mean


@triton.jit
def store_one_row(
    key, value, keys, values, rows, positions,
    key_head_step, key_row_step, value_head_step, value_row_step, cache_row_step, cache_head_step,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the key and the value of one row's newest token, of one key-value head."""
    at = tl.program_id(0)
    head = tl.program_id(1)
    along = tl.arange(0, PADDED_WIDTH)
    is_width = along < WIDTH
    place = tl.load(rows + at) * cache_row_step + head * cache_head_step + tl.load(positions + at) * WIDTH + along
    new_key = tl.load(key + head * key_head_step + at * key_row_step + along, mask=is_width, other=0.0)
    new_value = tl.load(value + head * value_head_step + at * value_row_step + along, mask=is_width, other=0.0)
    tl.store(keys + place, new_key, mask=is_width)
    tl.store(values + place, new_value, mask=is_width)


@triton.jit
def attend_one_row(
    query, key, value, keys, values, rows, positions, out, sinks,
    scale, softcap, window, chunk,
    query_head_step, query_row_step, key_head_step, key_row_step, value_head_step, value_row_step,
    cache_row_step, cache_head_step, out_row_step, out_head_step,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, SHARED: tl.constexpr, PADDED_SHARED: tl.constexpr,
    BLOCK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Attend for the query heads that share one key-value head of one row, with a softmax that is updated block by
    block.

    `scale`, `softcap` and the sinks are in units of log 2; a `window` or `chunk` of 0 is none. A sink is a score that
    takes part in the softmax and has no value.
    """
    at = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows + at)
    last = tl.load(positions + at)
    along = tl.arange(0, PADDED_WIDTH)
    is_width = along < WIDTH
    of_head = tl.arange(0, PADDED_SHARED)
    cached = row * cache_row_step + head * cache_head_step

    # the row's own key and value are stored for later steps and used from registers: a program may not see at once
    # what it has stored. Where `store_one_row` ran before, these are the same bytes again
    new_key = tl.load(key + head * key_head_step + at * key_row_step + along, mask=is_width, other=0.0)
    new_value = tl.load(value + head * value_head_step + at * value_row_step + along, mask=is_width, other=0.0)
    tl.store(keys + cached + last * WIDTH + along, new_key, mask=is_width)
    tl.store(values + cached + last * WIDTH + along, new_value, mask=is_width)

    query_heads = head * SHARED + of_head
    is_head = of_head < SHARED
    is_query = is_head[:, None] & is_width[None, :]
    from_query = query + query_heads[:, None] * query_head_step + at * query_row_step + along[None, :]
    queries = tl.load(from_query, mask=is_query, other=0.0)
    own = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    own = _capped(own, softcap, HAS_SOFTCAP)
    highest = own
    total = tl.full([PADDED_SHARED], 1.0, tl.float32)
    mean = tl.zeros([PADDED_SHARED, PADDED_WIDTH], tl.float32) + new_value.to(tl.float32)[None, :]
    if HAS_SINKS:
        sink = tl.load(sinks + query_heads, mask=is_head, other=float("-inf")) * 1.4426950408889634
        highest, total, mean = _with_sink(own, mean, sink)

    # from the row's first visible key in blocks of one size: the order of additions depends on nothing but the row
    for begin in range(_first_key(last, window, chunk), last, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        block_keys = _load_block(keys + cached, places[None, :], along[:, None], last, WIDTH)
        scores = tl.dot(queries, block_keys, input_precision="ieee") * scale
        scores = _capped(scores, softcap, HAS_SOFTCAP)
        scores = tl.where((places < last)[None, :], scores, float("-inf"))
        block_values = _load_block(values + cached, places[:, None], along[None, :], last, WIDTH)
        highest, total, mean = _with_block(highest, total, mean, scores, block_values)

    mean = mean / total[:, None]
    to_out = out + at * out_row_step + query_heads[:, None] * out_head_step + along[None, :]
    tl.store(to_out, mean.to(out.dtype.element_ty), mask=is_query)
