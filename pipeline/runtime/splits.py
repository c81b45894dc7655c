"""Models that are split over ranks or spread over devices: refused while a run is planned where they cannot be."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import read_model_facts
from pipeline.hub.parallel_plans import why_not_pipeline_parallel, why_not_tensor_parallel
from pipeline.hub.sources import ModelSource
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json
from pipeline.protocol.topology import HostPlan


def check_split(plan: HostPlan, source: ModelSource) -> None:
    """Refuse a model that cannot be split over its host's ranks or devices. Raises ConfigurationError."""
    num_ranks, num_devices = plan.model.tensor_parallel, plan.model.pipeline_parallel
    if num_ranks == num_devices == 1:
        return
    config = read_json(LocalTree(Path(source.path)), CONFIG)
    if source.quantisation is not None:
        config = {**config, "quantization_config": source.quantisation}
    if num_ranks > 1:
        cannot = f"cannot be split over {num_ranks} ranks"
        reason = why_not_tensor_parallel(config, num_ranks)
    else:
        cannot = f"cannot be spread over {num_devices} devices"
        reason = why_not_pipeline_parallel(config, read_model_facts(source).num_layers, num_devices)
    if reason is not None:
        where = f"{source.name} (for {', '.join(plan.serves)}), architecture {config.get('model_type')}"
        raise ConfigurationError(f"{where}, {cannot}: {reason}")
