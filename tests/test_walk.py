"""The walk of docs/architecture.md exists, and a sample goes through it in that order."""

import re
import sys
from pathlib import Path

from click.testing import CliRunner

import sample

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| `(\w+)` \| `([\w/.]+)` \|", re.M)
HOPS = [(name, file) for _, name, file in ROW.findall((ROOT / "docs/architecture.md").read_text())]


def test_it_is_short():
    assert len(HOPS) <= 12
    assert len({file for _, file in HOPS}) <= 6


def test_a_sample_goes_through_it_in_order(tmp_path):
    """The stack of the first call of the network, from the outside inwards."""
    stacks: list[list[tuple[str, str]]] = []

    def hop_of(frame) -> tuple[str, str]:
        return frame.f_code.co_name, frame.f_code.co_filename.removeprefix(f"{ROOT}/")

    def profile(frame, event, argument):
        if event != "call" or stacks or hop_of(frame) != HOPS[-1]:
            return
        stack = []
        while frame is not None:
            stack.append(hop_of(frame))
            frame = frame.f_back
        if HOPS[0] in stack and ("_evaluate", "solvers/epd.py") in stack:
            stacks.append([hop for hop in reversed(stack) if hop[1] in {file for _, file in HOPS}])

    arguments = ["--predictor", "exps/digits/distilled.pkl", "--seeds", "0", "--outdir", str(tmp_path)]
    sys.setprofile(profile)
    try:
        result = CliRunner().invoke(sample.main, arguments, catch_exceptions=False)
    finally:
        sys.setprofile(None)
    assert result.exit_code == 0
    assert stacks == [HOPS]
