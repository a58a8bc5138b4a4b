"""Entry point of `ray job submit -- python scripts/train.py --config FILE [key=value ...]`; same arguments as `sppo train`."""

import sys
from pathlib import Path

# Inside a Ray job the packages lie in the uploaded working directory and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
