"""`ray job submit … -- python jobs/evolve.py run.yaml [section.key=value ...]`: the job `tokenclean evolve`."""

from tokenclean_ray.cli import run_job

run_job("evolve")
