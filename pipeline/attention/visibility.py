"""What each layer of a model may attend to, learned from the model's own masks.

transformers describes a mask by a function of (query, key), and passes what an attention implementation makes of it
to every layer. Here such a function is decomposed into what the slot attention can compute: causal, a sliding window,
chunks. A mask of any other kind is refused by name. This is done once, when a model is loaded: computing masks in
every pass would make the CPU wait for the GPU.

A keyword such as `sliding_window` is no substitute: some families have a window in their mask and none in the
keyword.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

LEARNING = "cage_learning"
ROW_LENGTHS = (4, 3)  # tokens of two rows in the pass that learns
# what attention layers may ask for beyond the plain softmax; the first two are served
EXTRAS = ("softcap", "s_aux", "position_bias", "rel_logits")
SERVED_EXTRAS = ("softcap", "s_aux")


class NotServed(Exception):
    """A model's attention is not one that slots can compute; the message says why."""


@dataclass(frozen=True, slots=True)
class Visibility:
    """The keys of its own row that a query sees: up to itself, and no further back than this.

    Args:
        window: the last `window` keys, the query's own included; None: all.
        chunk: only keys of the query's own chunk of so many positions; None: all.
    """

    window: int | None = None
    chunk: int | None = None

    @property
    def is_unlimited(self) -> bool:
        """Whether a query sees every key before it."""
        return self.window is None and self.chunk is None

    def first_key(self, position: int) -> int:
        """The first key that the query at a position sees."""
        start = 0 if self.window is None else max(0, position + 1 - self.window)
        return start if self.chunk is None else max(start, position - position % self.chunk)

    def mask(self, queries_T: Tensor, keys_L: Tensor) -> Tensor:
        """Which keys [T, L] each query sees, by their positions."""
        distance = queries_T[:, None] - keys_L[None, :]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.chunk is not None:
            seen &= queries_T[:, None] // self.chunk == keys_L[None, :] // self.chunk
        return seen


ALL_KEYS = Visibility()


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What one attention call of a forward pass asks for.

    Args:
        visibility: which keys a query sees.
        has_extras: whether its scores have a softcap or it has sinks, which FlashAttention does not compute.
    """

    visibility: Visibility = ALL_KEYS
    has_extras: bool = False

    @property
    def suits_flash_attention(self) -> bool:
        """Whether torch's FlashAttention over rows of any lengths computes it."""
        return not self.has_extras and self.visibility.chunk is None


ALL_ALIKE = LayerFacts()


class _Described(Tensor):
    """Stands for the attention mask in the pass that learns.

    It is a tensor of a mask's dimensions, which models hand on from part to part. What a model computes from it is
    an ordinary tensor, and so known to be a mask of the model's own making.
    """

    visibility: Visibility
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, visibility: Visibility) -> _Described:
        """A mask that shows these keys."""
        described = torch.zeros(1, 1, 1, 1).as_subclass(cls)
        described.visibility = visibility
        return described

    def to(self, *_: Any, **__: Any) -> _Described:
        """Itself: it goes with a layer's inputs to any device."""
        return self


def learn_layers(model: Any) -> tuple[LayerFacts, ...]:
    """What every attention call of a forward pass asks for, in the order of the calls.

    The model is left with the attention implementation that learns: set another one afterwards.

    Raises:
        NotServed: it does not go through transformers' attention interface, or asks for what slots cannot compute.
    """
    found: list[LayerFacts] = []
    with _registered(_learner(found)):
        model.set_attn_implementation(LEARNING)
        device = next(model.parameters()).device
        positions = torch.tensor([[at for length in ROW_LENGTHS for at in range(length)]], device=device)
        with torch.inference_mode():
            # as a tensor: asked by a number, some models leave tokens out of layers whose keys others have made
            kept = torch.arange(sum(ROW_LENGTHS), device=device)
            model(input_ids=positions + 1, position_ids=positions, use_cache=False, logits_to_keep=kept)
    if not found:
        raise NotServed("its attention does not go through transformers' attention interface")
    return tuple(found)


def describe_mask(function: Callable[..., Any]) -> Visibility:
    """Decompose a mask function of transformers. Raises NotServed for one that slots cannot compute."""
    parts, is_causal = [function], False
    window: int | None = None
    chunk: int | None = None
    while parts:
        part = parts.pop()
        if part is masking_utils.causal_mask_function:
            is_causal = True
        elif _is_made_by(part, "and_masks"):
            parts += _captured(part)["mask_functions"]
        elif _is_made_by(part, "sliding_window_overlay"):
            size = int(_captured(part)["sliding_window"])
            window = size if window is None else min(window, size)
        elif _is_made_by(part, "chunked_overlay"):
            if bool(torch.as_tensor(_captured(part)["left_padding"]).any()):
                raise NotServed("its chunks begin behind a left padding")
            chunk = int(_captured(part)["chunk_size"])
        elif _is_made_by(part, "remap_positions_for_packed_sequence"):
            # several rows in one pass, each at its own positions: what a pass over slots means anyway
            parts.append(_captured(part)["mask_function"])
        elif _is_made_by(part, "or_masks"):
            parts.append(_without_blocks(_captured(part)["mask_functions"]))
        elif part is not getattr(masking_utils, "packed_sequence_mask_function", None) and not _is_made_by(
            part, "packed_sequence_mask_function"
        ):
            raise NotServed(f"its mask has {part.__module__}.{part.__qualname__}, which slots cannot compute")
    if not is_causal:
        raise NotServed("its mask is not causal")
    return Visibility(window, chunk)


def _without_blocks(functions: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The first of alternatives whose others are blocks that see each other, such as images: none in plain text."""
    first, *others = functions
    for other in others:
        if not _is_made_by(other, "blockwise_overlay") or bool((_captured(other)["block_sequence_ids"] >= 0).any()):
            raise NotServed(f"its mask lets queries see later keys ({getattr(other, '__qualname__', other)})")
    return first


def _is_made_by(function: Callable[..., Any], maker: str) -> bool:
    """Whether a function is the closure that this function of transformers returns."""
    name = getattr(function, "__qualname__", "")
    return function.__module__ == masking_utils.__name__ and name.startswith(f"{maker}.<locals>.")


def _captured(function: Any) -> dict[str, Any]:
    """The variables that a closure holds."""
    return dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True)
    )


def _learner(found: list[LayerFacts]) -> Callable[..., tuple[Tensor, None]]:
    """An attention function that appends what each call asks for to `found`, and returns zeros."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        asked = [name for name in EXTRAS if options.get(name) is not None and name not in SERVED_EXTRAS]
        if asked:
            raise NotServed(f"its attention asks for {', '.join(asked)}")
        if not isinstance(attention_mask, _Described):
            raise NotServed("it makes attention masks by code of its own")
        has_extras = any(options.get(name) is not None for name in SERVED_EXTRAS)
        found.append(LayerFacts(attention_mask.visibility, has_extras))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    return attend


def _describe(
    *_: Any, mask_function: Callable[..., Any] = masking_utils.causal_mask_function, **__: Any
) -> _Described:
    return _Described.of(describe_mask(mask_function))


@contextmanager
def _registered(attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Register the learning attention and its masks with transformers while the block runs."""
    AttentionInterface.register(LEARNING, attend)
    AttentionMaskInterface.register(LEARNING, _describe)
    try:
        yield
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(LEARNING, None)
