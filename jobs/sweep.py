"""`ray job submit … -- python jobs/sweep.py run.yaml [section.key=value ...]`: the job `tokenclean sweep`."""

from tokenclean_ray.cli import run_job

run_job("sweep")
