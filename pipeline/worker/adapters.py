"""LoRA adapters of one model, mixed in a pass: every token has its own, or none.

peft loads the adapters; then these layers replace its own. peft mixes adapters by selecting the tokens of one adapter
after another, which takes several times as many operations, and none of them can be captured in a CUDA graph. Here
the ranks of all adapters are one product down and one up, and in between a gate keeps the ranks of a token's adapter.
An adapter that depends on a preference vector (`pipeline.hub.preference_adapters`) is one whose ranks are scaled by
the row's own: rows of other vectors have other adapters in one pass.

T tokens of a pass, A adapters, R ranks of all of them together, I inputs and O outputs of a projection.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from pipeline.hub.preference_adapters import PreferenceForm
from pipeline.protocol.topology import HostRole
from pipeline.worker.quantised import is_plain
from pipeline.worker.ranks import local_part, sum_over_ranks

# peft's layers over quantised projections; what they add is what they add to ordinary ones
OVER_QUANTISED = frozenset(
    (
        "AqlmLoraLinear", "AwqLoraLinear", "EetqLoraLinear", "GPTQLoraLinear", "HqqLoraLinear", "Linear4bit",
        "Linear8bitLt", "TorchaoLoraLinear",
    )
)  # fmt: skip
MIN_RANKS = 4  # a matrix product with one column takes a kernel whose bits depend on the number of tokens


class TokenAdapters:
    """Which adapter each token of the running pass has, by its number; 0 is none.

    Args:
        names: of the adapters; the first has number 1.
        forms: of those adapters that are used at the preference vector of each row, by name.

    Attributes:
        of_tokens: the numbers of the pass's tokens, [T]; set before each pass.
        forms: as given.
        preferences: of the pass's tokens, [T, 1 + objectives], with 1 in the first column; None: 1 everywhere.
    """

    def __init__(self, names: Sequence[str], forms: Mapping[str, PreferenceForm] = MappingProxyType({})) -> None:
        self._numbers: dict[str | None, int] = {None: 0, **{name: at for at, name in enumerate(names, 1)}}
        self.of_tokens = torch.empty(0, dtype=torch.long)
        self.forms = forms
        self.preferences: Tensor | None = None
        self._copies: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def num_preferences(self) -> int:
        """Columns of `preferences`; 0 where no adapter depends on the row."""
        return max((1 + len(form.objectives) for form in self.forms.values()), default=0)

    def preference(self, role: HostRole, weights: Sequence[float]) -> list[float] | None:
        """A row of `preferences`: 1, and the weights of the adapter's objectives, which are scaled to sum to 1.

        Without weights, as where a model is probed, all are 1. Where all of them are 0, they are equal.

        Args:
            role: with the principal of each objective that has one; the others weigh nothing.
            weights: of the row, by principal.
        """
        if role.adapter is None or role.adapter not in self.forms:
            return None
        form = self.forms[role.adapter]
        row = [1.0] * self.num_preferences
        if not weights:
            return row
        of_objectives = [0.0] * len(form.objectives)
        for objective, principal in role.preference:
            index = form.index(objective)
            assert index is not None
            of_objectives[index] += weights[principal]
        total = sum(of_objectives)
        count = len(of_objectives)
        row[1 : 1 + count] = [each / total if total else 1 / count for each in of_objectives]
        return row

    def preferences_of(self, states: Tensor) -> Tensor:
        """The preferences of the tokens that some inputs belong to, as `of` gives their adapters."""
        assert self.preferences is not None
        numbers = self.of(states)
        preferences = self._near("preferences", self.preferences, states.device)
        last = preferences[len(preferences) - numbers.numel() :]
        return last.view(*numbers.shape, -1)

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
        of_tokens = self._near("of_tokens", self.of_tokens, states.device)
        numbers = of_tokens[len(of_tokens) - num_tokens :]
        return numbers.view(states.shape[:-1]) if has_rows else numbers

    def _near(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of the pass on a layer's device: a copy where that is another one, made once a pass."""
        if tensor.device == device:
            return tensor
        source, copy = self._copies.get((name, device), (None, tensor))
        if source is not tensor:
            copy = tensor.to(device)
            self._copies[name, device] = tensor, copy
        return copy


class LowRank(nn.Module):
    """What the adapters add to one projection.

    Args:
        down: [R, I].
        up: [O, R].
        gates: [A + 1, R], the scaling of an adapter at its own ranks and 0 at others'.
        adapters: of the running pass.
        columns: the column of the tokens' preferences that scales each rank, [R]; None: no rank depends on them.
        add_parts: adds over the processes that share the projection's inputs, [..., R]; None: this one has them all.
    """

    down: Tensor
    up: Tensor
    gates: Tensor
    columns: Tensor | None

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        gates: Tensor,
        adapters: TokenAdapters,
        columns: Tensor | None = None,
        add_parts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, tensor in (("down", down), ("up", up), ("gates", gates), ("columns", columns)):
            self.register_buffer(name, tensor)
        self.adapters = adapters
        self.add_parts = add_parts

    def forward(self, states: Tensor, rows: slice = slice(None)) -> Tensor:
        """What is added to the outputs of `rows`, for inputs [1, T, I], or [R, 1, I] of R rows of one token."""
        gates = self.gates[self.adapters.of(states)]
        if self.columns is not None and self.adapters.preferences is not None:
            gates = gates * self.adapters.preferences_of(states)[..., self.columns]
        inner = linear(states, self.down)
        if self.add_parts is not None:
            inner = self.add_parts(inner)
        return linear(inner * gates, self.up[rows])


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
def take_adapters(
    model: Any, names: Sequence[str], forms: Mapping[str, PreferenceForm] = MappingProxyType({})
) -> TokenAdapters:
    """Replace peft's layers by these, in the model that peft wraps.

    Args:
        model: a model of peft, with the adapters loaded.
        names: of the adapters.
        forms: of those that are used at the preference vector of each row, by name.

    Raises:
        NotImplementedError: an adapter does more than LoRA of linear layers and replacing whole modules.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapters = TokenAdapters(names, forms)
    for path, parent in list(model.get_base_model().named_modules()):
        for name, child in list(parent.named_children()):
            if _is_lora(child, Linear):
                low_rank = _low_rank(child, names, adapters, dtype=model.get_base_model().dtype)
                setattr(parent, name, AdaptedLinear(child.base_layer, low_rank))
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


def _is_lora(layer: Any, linear: type) -> bool:
    """Whether a layer of peft's is a linear map, quantised or not, and what LoRA adds to it."""
    is_linear = type(layer) is linear or (
        type(layer).__module__.startswith("peft.tuners.lora.") and type(layer).__name__ in OVER_QUANTISED
    )
    return is_linear and not layer.lora_variant and not any(layer.lora_bias.values())


def _low_rank(layer: Any, names: Sequence[str], adapters: TokenAdapters, *, dtype: torch.dtype) -> LowRank:
    """What adapters add, in the type of the layer's weights; in `dtype`, the model's, where those are quantised."""
    present = [name for name in names if name in layer.lora_A]
    weight = getattr(layer.base_layer, "weight", None)
    if isinstance(weight, Tensor):
        weight = local_part(weight)
    dtype = weight.dtype if isinstance(weight, Tensor) and is_plain(weight) else dtype
    # of a model that is split over ranks peft has split these as the projection is: over its outputs, or its inputs
    down_parts = [local_part(layer.lora_A[name].weight) for name in present]
    up_parts = [local_part(layer.lora_B[name].weight) for name in present]
    device = down_parts[0].device
    down, up = torch.cat(down_parts).to(device, dtype), torch.cat(up_parts, 1).to(device, dtype)
    shares_inputs = down.shape[1] < layer.lora_A[present[0]].weight.shape[1]
    missing = max(0, MIN_RANKS - len(down))
    down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
    gates = down.new_zeros(len(names) + 1, len(down))
    columns = torch.zeros(len(down), dtype=torch.long, device=down.device)
    at = 0
    for name in present:
        rank = layer.lora_A[name].weight.shape[0]
        gates[adapters.number(name), at : at + rank] = layer.scaling[name]
        if name in adapters.forms:
            form = adapters.forms[name]
            of_objectives = torch.arange(1, len(form.objectives) + 1, device=down.device)
            columns[at + form.fixed_rank : at + rank] = of_objectives.repeat_interleave(form.rank)
        at += rank
    return LowRank(
        down, up, gates, adapters, columns if columns.any() else None, sum_over_ranks if shares_inputs else None
    )
