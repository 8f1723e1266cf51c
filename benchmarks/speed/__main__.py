from common.errors import run_command

from .summary import main

run_command(main)
