"""Exports the metrics of a run through Ray, which serves them to Prometheus on every machine.

All series of a run come from the process of its progress board. There they outlive replicas and hosts that are
replaced, and one endpoint has all of them. Without the packages of `ray[default]` Ray exports nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from ray.util.metrics import Counter, Gauge

from pipeline.monitoring.metrics import METRICS, Metric, MetricKind, Value

LABELS = ("run", "replica")
# Ray refuses to add 0. A series has to be there before its first event: what goes from nothing to 1 does not count as
# an increase. Added to any number that is counted here, this changes nothing.
NOTHING = 5e-324


class MetricExporter:
    """Turns the values of many processes into Ray's metrics.

    Args:
        run: the label of all series: the run's folder.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._exported: dict[Metric, Counter | Gauge] = {metric: _exported(metric) for metric in METRICS}
        self._seen: dict[tuple[str, Metric, tuple[str, ...]], float] = {}

    def export(self, process: str, replica: int, values: Iterable[Value]) -> None:
        """Export what a process reported.

        Args:
            process: its name; a counter grows by what is new since the process's last report.
            replica: its number.
            values: since the process started.
        """
        for value in values:
            exported = self._exported[value.metric]
            tags = dict(zip(LABELS + value.metric.labels, (self._run, str(replica), *value.labels), strict=True))
            if isinstance(exported, Gauge):
                exported.set(value.number, tags)
                continue
            key = (process, value.metric, value.labels)
            new = value.number - self._seen.get(key, 0.0)
            if new > 0 or key not in self._seen:
                exported.inc(max(new, NOTHING), tags)
                self._seen[key] = value.number

    def clear(self, replica: int, values: Iterable[Value]) -> None:
        """Set the gauges among the values of a replica that is gone to 0."""
        gauges = (value for value in values if value.metric.kind is MetricKind.GAUGE)
        self.export("", replica, (Value(value.metric, 0.0, value.labels) for value in gauges))


def _exported(metric: Metric) -> Counter | Gauge:
    kind = Counter if metric.kind is MetricKind.COUNTER else Gauge
    return kind(metric.name, description=metric.description, tag_keys=(*LABELS, *metric.labels))
