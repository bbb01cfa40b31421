"""`ray job submit … -- python jobs/evaluate.py MODEL... --suite paper --out s3://…`: the job `tokenclean evaluate`."""

from tokenclean_ray.cli import run_job

run_job("evaluate")
