"""What `accelerate launch` starts in each process: one run of a config file."""

import sys
from pathlib import Path

from sdlora.training.config import load
from sdlora.training.run import run_training

if __name__ == "__main__":
    run_training(load(Path(sys.argv[1]), {}))
