"""The real layouts with random weights, from a folder as published to an image: the code that loads real
weights, without them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> dict:
    """The benchmark's row, from a process of its own, whose memory is measured."""
    command = [sys.executable, "-m", "benchmarks.speed.full_size", *arguments, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SLOW = pytest.mark.slow
CUT = ["--layers", "1", "--resolution"]


@pytest.mark.parametrize(
    "family, arguments, parts, gigabytes",
    [
        pytest.param(
            "sd3", [*CUT, "128"], {"transformer": 73.8, "text_encoder_3": 324.5}, 8, marks=SLOW
        ),  # float16 on a CPU
        pytest.param("flux", [*CUT, "64"], {"transformer": 545.5, "text_encoder_2": 324.5}, 8, marks=SLOW),
        pytest.param(
            "ldm",
            ["--dtype", "float32", "--resolution", "64"],
            {"unet": 859.5, "text_encoder": 123.1},
            9,
            marks=SLOW,
        ),
    ],
)
def test_from_folder_to_image(family, arguments, parts, gigabytes):
    row = run(family, *arguments)
    assert row["pixels"] == int(arguments[arguments.index("--resolution") + 1])
    for name, millions in parts.items():
        assert row["parameters"][name] / 1e6 == pytest.approx(millions, abs=0.1)
    print(f"{family}: peak memory {row['peak_gigabytes']:.1f} GB")
    assert 1 < row["peak_gigabytes"] < gigabytes
