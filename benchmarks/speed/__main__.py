"""python -m benchmarks.speed."""

from common.errors import run_command

from .summary import main

if __name__ == "__main__":
    run_command(main)
