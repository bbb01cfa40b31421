"""`ray job submit … -- python jobs/train.py run.yaml [section.key=value ...]`: the job `tokenclean train`."""

from tokenclean_ray.cli import run_job

run_job("train")
