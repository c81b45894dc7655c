"""How a model's weights are split over the ranks of a host: by transformers' own tensor and expert parallel plans.

Each rank reads its own part of every file. A projection whose inputs are split gives a part of a sum, and the parts
are added over the ranks. With two ranks there is one order of additions. With more, libraries add each number in an
order that depends on its place in the tensor, so in strict mode all parts are gathered and added in the order of the
ranks: a row's bits then do not depend on its place in a pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    MoeExpertsParallel,
    RowwiseParallel,
)

from pipeline.hub.parallel_plans import number_of_experts
from pipeline.worker.ranks import sum_over_ranks

ORDERED = "cage_ordered"
ROWWISE = ("rowwise", "rowwise_split_input", "rowwise_rep")  # styles whose modules give a part of a sum
EXPERTS = "moe_tp_experts"


def from_pretrained_options(config: PreTrainedConfig, num_ranks: int, *, is_strict: bool) -> dict[str, Any]:
    """Options of `from_pretrained` that split the weights over the ranks of this process's group.

    Experts are dealt out whole where the family has a plan for that and their number can be divided; otherwise each
    of them is split.

    Args:
        config: of the model.
        num_ranks: 1: nothing is split.
        is_strict: whether sums over more than two ranks are added in the order of the ranks.
    """
    if num_ranks == 1:
        return {}
    ordered = is_strict and num_ranks > 2
    if ordered:
        _order_sums()
    options: dict[str, Any] = {"tp_size": num_ranks}
    text = config.get_text_config(decoder=True)
    experts = number_of_experts(text.to_dict())
    if text.base_model_ep_plan and experts and experts % num_ranks == 0:
        options |= {"ep_size": num_ranks, "ep_implementation": ORDERED if ordered else "all_reduce"}
    return {"distributed_config": DistributedConfig(**options)}


class OrderedRowwise(RowwiseParallel):  # type: ignore[misc]  # transformers has no types
    """transformers' rowwise style, with sums in the order of the ranks."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        """The sum over the ranks, and the bias once."""
        assert self.should_use_local_tensors(module), f"{type(module).__name__} is not computed on local weights"
        total = sum_over_ranks(output)
        bias = module._parameters.get("bias")
        return total if bias is None else total + getattr(bias, "to_local", lambda: bias)()


class OrderedExperts(MoeExpertsParallel):  # type: ignore[misc]
    """transformers' style of experts that are each split, with sums in the order of the ranks."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        """The sum over the ranks."""
        return None if output is None else sum_over_ranks(output)


def _order_sums() -> None:
    """Have every style of this process that sums over ranks do so in their order."""
    from transformers.distributed.expert_parallel import AllReduceEP, EPImplementationInterface

    class OrderedExpertsOfRanks(AllReduceEP):  # type: ignore[misc]
        """Each rank's own experts on all tokens; a choice of another rank's expert counts nothing here."""

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            is_other = (top_k_index // self.num_local_experts) != self.ep_mesh.get_local_rank()
            own_index = (top_k_index % self.num_local_experts).masked_fill(is_other, self.num_local_experts)
            part = self.experts_forward(hidden_states, own_index, top_k_weights.masked_fill(is_other, 0.0))
            return sum_over_ranks(part)

    for name in ROWWISE:
        ALL_PARALLEL_STYLES.register(name, OrderedRowwise(input_layouts=ALL_PARALLEL_STYLES[name].input_layouts))
    ALL_PARALLEL_STYLES.register(EXPERTS, OrderedExperts())
    EPImplementationInterface.register(ORDERED, OrderedExpertsOfRanks)
