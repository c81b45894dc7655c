"""LoRA adapters of one model, mixed in a pass: every token has its own, or none.

peft loads the adapters; then these layers replace its own. peft mixes adapters by selecting the tokens of one adapter
after another, which takes several times as many operations, and none of them can be captured in a CUDA graph. Here
the ranks of all adapters are one product down and one up, and in between a gate keeps the ranks of a token's adapter.

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
    """Which adapter each token of the running pass has, by its number; 0 is none.

    Args:
        names: of the adapters; the first has number 1.

    Attributes:
        of_tokens: the numbers of the pass's tokens, [T]; set before each pass.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers: dict[str | None, int] = {None: 0, **{name: at for at, name in enumerate(names, 1)}}
        self.of_tokens = torch.empty(0, dtype=torch.long)

    def number(self, name: str | None) -> int:
        """An adapter's number."""
        return self._numbers[name]

    def of(self, states: Tensor) -> Tensor:
        """The adapters of the tokens that a module sees, which are the last of the pass: the head sees only those.

        Args:
            states: [1, T, I], where the result is [T], or [R, 1, I] of R rows of one token, where it is [R, 1].
        """
        has_rows = states.ndim > 2 and len(states) > 1
        num_tokens = states.shape[:-1].numel() if has_rows else states.shape[-2]
        numbers = self.of_tokens[len(self.of_tokens) - num_tokens :]
        return numbers.view(states.shape[:-1]) if has_rows else numbers


class LowRank(nn.Module):
    """What the adapters add to one projection.

    Args:
        down: [R, I].
        up: [O, R].
        gates: [A + 1, R], the scaling of an adapter at its own ranks and 0 at others'.
        adapters: of the running pass.
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
        """What is added to the outputs of `rows`, for inputs [1, T, I], or [R, 1, I] of R rows of one token."""
        low = linear(states, self.down) * self.gates[self.adapters.of(states)]
        return linear(low, self.up[rows])


class _Adapted(nn.Module):
    """A module of the model with adapters."""

    base: Any

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The base's: models read a dtype or a device from their modules' weights."""
        weight: Tensor = self.base.weight
        return weight


class AdaptedLinear(_Adapted):
    """A projection with adapters.

    Args:
        base: the projection.
        low_rank: what adapters add to it.
    """

    def __init__(self, base: nn.Module, low_rank: LowRank) -> None:
        super().__init__(base)
        self.low_rank = low_rank

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.base(states) + self.low_rank(states)
        return out


class ReplacedModule(_Adapted):
    """A module that some adapters replace as a whole.

    Args:
        base: for tokens of the other adapters.
        own: the replacement by the adapter's number.
        adapters: of the running pass.
    """

    def __init__(self, base: nn.Module, own: dict[int, nn.Module], adapters: TokenAdapters) -> None:
        super().__init__(base)
        self.numbers = list(own)
        self.own = nn.ModuleList(own.values())
        self.adapters = adapters

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.base(states)
        numbers = self.adapters.of(out)[..., None]
        for number, module in zip(self.numbers, self.own, strict=True):
            out = torch.where(numbers == number, module(states), out)
        return out


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Hide peft's warnings: of its own use of transformers, of merging, and of faults that are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


@torch.no_grad()
def take_adapters(model: Any, names: Sequence[str]) -> TokenAdapters:
    """Replace peft's layers by these, in the model that peft wraps.

    Args:
        model: a model of peft, with the adapters loaded.
        names: of the adapters.

    Raises:
        NotImplementedError: an adapter does more than LoRA of linear layers and replacing whole modules.
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
    model.requires_grad_(False)  # peft turns on gradients of the adapter that was set last
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
