"""train_flux.sh names what is missing before it starts anything (tests/test_published_training.py runs it
whole).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("table", "stream", "missing"),
    [
        ("start.pkl", "stderr", "start.pkl"),
        (str(ROOT / "exps/flux/start.pkl"), "stdout", "weights black-forest-labs/FLUX.1-dev: missing"),
    ],
)
def test_what_is_missing_is_named_before_anything_starts(tmp_path, table, stream, missing):
    (tmp_path / "flux.yaml").write_text(f"run: {{output_root: {tmp_path}/exps}}\n")
    variables = {
        "PYTHON": sys.executable,
        "FLUX_CONFIG": str(tmp_path / "flux.yaml"),
        "FLUX_SNAPSHOT_PATH": table,
        "FLUX_MODEL_PATH": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(ROOT / "train_flux.sh")]
    environment = os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert missing in getattr(done, stream)
    assert not (tmp_path / "exps").exists()
