"""LoRA adapters of one model, mixed in a pass: every token has its own, or none.

peft reads the adapters; then its layers give way to these. Its own way of mixing picks out the tokens of each adapter
one adapter after another, which takes several times as many operations, and none of them can be recorded. Here all
adapters' ranks are one product down and one up, and in between a token keeps what is its own adapter's.

T tokens of a pass, A adapters, R ranks of all of them together, I inputs and O outputs of a projection.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

MIN_RANKS = 4  # a matrix product with one column takes a kernel whose bits depend on the number of tokens


class TokenAdapters:
    """Which adapter each token of the pass under way has, by its number; 0 is none.

    Args:
        names: of the adapters; the first has number 1.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers: dict[str | None, int] = {None: 0, **{name: at for at, name in enumerate(names, 1)}}
        self.of_tokens = torch.empty(0, dtype=torch.long)

    def number(self, name: str | None) -> int:
        """An adapter's number."""
        return self._numbers[name]

    def of_last(self, num_tokens: int) -> Tensor:
        """The adapters of the last tokens of the pass: some modules see those alone."""
        return self.of_tokens[len(self.of_tokens) - num_tokens :]


class LowRank(nn.Module):
    """What the adapters add to one projection.

    Args:
        down, up: [R, I] and [O, R].
        gates: [A + 1, R], the scaling of an adapter at its own ranks and 0 at others'.
        adapters: of the pass under way.
    """

    down: Tensor
    up: Tensor
    gates: Tensor

    def __init__(self, down: Tensor, up: Tensor, gates: Tensor, adapters: TokenAdapters) -> None:
        super().__init__()
        for name, tensor in (("down", down), ("up", up), ("gates", gates)):
            self.register_buffer(name, tensor)
        self.adapters = adapters

    def forward(self, states: Tensor, rows: slice = slice(None)) -> Tensor:
        """What is added to some outputs, for inputs [..., T, I]."""
        low = linear(states, self.down) * self.gates[self.adapters.of_last(states.shape[-2])]
        return linear(low, self.up[rows])


class _Adapted(nn.Module):
    """A module of the model, and what adapters make of it."""

    base: Any

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The base's: models ask their modules for a type or a device."""
        weight: Tensor = self.base.weight
        return weight


class AdaptedLinear(_Adapted):
    """A projection with adapters."""

    def __init__(self, base: nn.Module, low_rank: LowRank) -> None:
        super().__init__(base)
        self.low_rank = low_rank

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.base(states) + self.low_rank(states)
        return out


class ReplacedModule(_Adapted):
    """A module that some adapters bring with them as a whole.

    Args:
        base: for tokens of the other adapters.
        own: by the adapter's number.
        adapters: of the pass under way.
    """

    def __init__(self, base: nn.Module, own: dict[int, nn.Module], adapters: TokenAdapters) -> None:
        super().__init__(base)
        self.numbers = list(own)
        self.own = nn.ModuleList(own.values())
        self.adapters = adapters

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.base(states)
        of_tokens_T1 = self.adapters.of_last(out.shape[-2])[:, None]
        for number, module in zip(self.numbers, self.own, strict=True):
            out = torch.where(of_tokens_T1 == number, module(states), out)
        return out


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Let peft ask transformers under an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


@torch.no_grad()
def take_adapters(model: Any, names: Sequence[str]) -> TokenAdapters:
    """Put these layers in the place of peft's, in the model that it wraps.

    Raises NotImplementedError for adapters that are more than LoRA of linear layers and modules of their own.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapters = TokenAdapters(names)
    for path, parent in list(model.get_base_model().named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear and not child.lora_variant and not any(child.lora_bias.values()):
                setattr(parent, name, AdaptedLinear(child.base_layer, _low_rank(child, names, adapters)))
            elif type(child) is ModulesToSaveWrapper:
                own = {
                    adapters.number(key): child.modules_to_save[key] for key in names if key in child.modules_to_save
                }
                setattr(parent, name, ReplacedModule(child.original_module, own, adapters))
            elif isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
                raise NotImplementedError(
                    f"an adapter changes {path}.{name} by more than LoRA of a linear layer ({type(child).__name__}), "
                    "which is not mixed with others in a pass; merge it into its model (peft's merge_and_unload) and "
                    "name that as a model"
                )
    model.requires_grad_(False)  # peft asks for gradients of the adapter that it was last told to use
    return adapters


def _low_rank(layer: Any, names: Sequence[str], adapters: TokenAdapters) -> LowRank:
    present = [name for name in names if name in layer.lora_A]
    like = layer.base_layer.weight
    down = torch.cat([layer.lora_A[name].weight for name in present]).to(like)
    up = torch.cat([layer.lora_B[name].weight for name in present], 1).to(like)
    missing = max(0, MIN_RANKS - len(down))
    down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
    gates = down.new_zeros(len(names) + 1, len(down))
    at = 0
    for name in present:
        rank = layer.lora_A[name].weight.shape[0]
        gates[adapters.number(name), at : at + rank] = layer.scaling[name]
        at += rank
    return LowRank(down, up, gates, adapters)
