"""`python -m sppo_ray` is `sppo`."""

from sppo_ray.cli import main

main()
