"""What a run counts, for Prometheus: the driver's node exports it, under names that begin with `ray_tokenclean_`.

Input: what stages finish, see `progress`, and single figures. cluster/grafana-dashboard.json shows them.
"""

from ray.util.metrics import Counter, Gauge, Histogram

from tokenclean_ray import progress
from tokenclean_ray.errors import redact

BY_STAGE = ("run", "stage")
DONE = {
    what: Counter(f"tokenclean_{what}", f"{what} that a stage has finished", BY_STAGE)
    for what in ("parts", "rows", "tokens")
}
NOW = {
    f"{what}_{of}": Gauge(f"tokenclean_{what}_{of}", f"of the newest stage of this name; 0: {unknown}", BY_STAGE)
    for what in ("parts", "tokens")
    for of, unknown in (("done", "none yet"), ("wanted", "not known"))
}
KEPT_SHARE = Gauge("tokenclean_kept_share", "of the response tokens of the newest selection", ("run",))
REJECTED = Gauge("tokenclean_rejected_rows", "of the newest input, by reason", ("run", "reason"))
DRIFT = Gauge("tokenclean_drift", "of new rows' scores from the others', Kolmogorov-Smirnov distance", ("run",))
RETRIES = Counter("tokenclean_retries", "parts scored again with a smaller budget, for lack of memory", ("run",))
LOAD = Histogram(
    "tokenclean_load_seconds", "that a scoring actor took to load its models", [1, 3, 10, 30, 100, 300, 1000], ("run",)
)
ALL = (*DONE.values(), *NOW.values(), KEPT_SHARE, REJECTED, DRIFT, RETRIES, LOAD)


def follow(run: str) -> None:
    """Count the stages of this process from now on, as those of a run."""
    for metric in ALL:
        metric.set_default_tags({"run": redact(run)})
    progress.watch(run, _count)


def _count(stage: progress.Figures, done: dict[str, int]) -> None:
    tags = {"stage": stage["name"]}
    for what, gauge in NOW.items():
        gauge.set(stage[what.removesuffix("_done")], tags)
    for what, amount in done.items():
        if amount:
            DONE[what].inc(amount, tags)
