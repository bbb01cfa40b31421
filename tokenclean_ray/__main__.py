"""`python -m tokenclean_ray`, where the command `tokenclean` is not installed."""

from tokenclean_ray.cli import main

raise SystemExit(main())
