"""Model judges on the machines of a Ray cluster: actors that score shards."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import ray

from pipeline.cluster.ray_errors import first_reason
from pipeline.cluster.session import joined
from pipeline.config.sections import Config
from pipeline.errors import CageError
from pipeline.evaluation.judges.interface import Judge
from pipeline.evaluation.scores import ScoreFiles
from pipeline.sections import Resources
from pipeline.storage.commits import CommitRecord


class ShardScorer:
    """Holds the judges of a panel in one actor.

    Scoring a shard again changes nothing, so Ray may restart the actor and retry its calls (unlike those of hosts).

    Args:
        scores: the panel, and where scores are written.
    """

    def __init__(self, scores: ScoreFiles) -> None:
        self._scores = scores
        self._judges: dict[str, Judge] | CageError
        try:
            self._judges = scores.panel.load()
        except CageError as error:  # Ray would turn an error in a constructor into one of its own classes
            self._judges = error

    def score(self, record: CommitRecord) -> CageError | None:
        """Score a shard and write the scores; returns the error that kept it from that, or None."""
        if isinstance(self._judges, CageError):
            return self._judges
        try:
            self._scores.score(record, self._judges)
        except CageError as error:
            return error
        return None


def score_shards(
    scores: ScoreFiles, records: Sequence[CommitRecord], config: Config, *, is_verbose: bool
) -> Generator[None, None, None]:
    """Score the shards on as many actors as the run has replicas; yields after each.

    Args:
        scores: the panel, and where scores are written.
        records: of the shards.
        config: of the run.
        is_verbose: whether Ray's own output is shown.

    Raises:
        CageError: a judge cannot be loaded or its actor died more often than `errors.max_attempts` allows; scores
            that are written are kept.
    """
    num_actors = min(config.cluster.replica_range.max, len(records))
    asked = _resources(scores)
    with joined(config.cluster, num_cpus=num_actors * asked.num_cpus, is_verbose=is_verbose):
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        actor_class = ray.remote(ShardScorer).options(
            num_cpus=asked.num_cpus,
            num_gpus=asked.num_gpus if has_gpus else 0,
            max_restarts=config.errors.max_attempts,
            max_task_retries=config.errors.max_attempts,
        )
        shared = ray.put(scores)
        actors = [actor_class.remote(shared) for _ in range(num_actors)]
        try:
            pool = ray.util.ActorPool(actors)
            for error in pool.map_unordered(lambda actor, record: actor.score.remote(record), records):
                if error is not None:
                    raise error
                yield
        except ray.exceptions.RayError as error:
            raise CageError(f"the judges' actors failed; what is scored is kept: {first_reason(error)}") from error
        finally:
            for actor in actors:
                ray.kill(actor)


def _resources(scores: ScoreFiles) -> Resources:
    """What one actor reserves: the sum over its models; one that may use a GPU and names no number has one."""
    models = scores.panel.required_models
    gpus = [
        model.resources.num_gpus if model.resources.num_gpus is not None else float(model.device != "cpu")
        for model in models
    ]
    return Resources(num_cpus=sum(model.resources.num_cpus for model in models), num_gpus=sum(gpus))
