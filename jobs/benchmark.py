"""`ray job submit … -- python jobs/benchmark.py score --baseline`: the job `tokenclean benchmark`."""

from tokenclean_ray.cli import run_job

run_job("benchmark")
