"""`ray job submit … -- python jobs/clean.py run.yaml [section.key=value ...]`: the job `tokenclean clean`."""

from tokenclean_ray.cli import run_job

run_job("clean")
