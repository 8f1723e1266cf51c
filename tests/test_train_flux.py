"""train_flux.sh from start table to export, with the digits twin where FLUX.1-dev would be."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from digits import FOLDERS, OPTIONS
from solvers import Predictor, SolverTable, Spec, flowmatch, load_predictor, save_predictor

ROOT = Path(__file__).parent.parent
CONFIG = """
run: {output_root: FOLDER/exps}
data: {predictor_snapshot: FOLDER/unused.pkl}
reward: {type: digits}
ppo: {rollout_batch_size: 8, rloo_k: 4, rollout_chunk: 8, minibatch_size: 4, steps: 3,
  learning_rate: 0.01, dirichlet_concentration: 100}
evaluation: {interval: 2, images: 4, batch: 4}
"""


def train(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {
        "PYTHON": sys.executable,
        "FLUX_MASTER_PORT": port,
        "FLUX_CONFIG": str(folder / "flux.yaml"),
        "OMP_NUM_THREADS": "1",
    }
    told |= {
        "FLUX_SNAPSHOT_PATH": str(folder / "start.pkl"),
        "FLUX_MODEL_PATH": str(FOLDERS["flux"]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(ROOT / "train_flux.sh")]
    return subprocess.run(
        command, env=os.environ | told | variables, capture_output=True, text=True, timeout=300
    )


def test_from_start_table_to_exported_predictor(tmp_path):
    (tmp_path / "flux.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    (tmp_path / "prompts.txt").write_text(
        "\n".join(f"a handwritten {n}" for n in ("one", "two", "three", "four", "five", "six", "seven"))
    )
    spec = Spec(
        backend="flux",
        backend_config=dict(OPTIONS["flux"]),
        num_steps=3,
        guidance_rate=3.5,
        schedule_type="flowmatch",
    )
    save_predictor(Predictor(SolverTable.uniform(2, 2), spec, flowmatch(3, mu=0.46)), tmp_path / "start.pkl")
    prompts = {"FLUX_PROMPT_CSV": str(tmp_path / "prompts.txt")}
    done = train(
        tmp_path, FLUX_RUN_NAME="twin", FLUX_MAX_STEPS="2", FLUX_EXPORT_CHECKPOINT="step000002.pt", **prompts
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "exps").glob("*-twin")
    assert load_predictor(run / "export" / "network-snapshot-export-best.pkl").spec.backend == "flux"
    assert (run / "export" / "export-manifest-step000002.json").is_file()
    assert "network-snapshot-export-step000002.pkl" in done.stdout
    assert "CUDA_LAUNCH_BLOCKING" not in (ROOT / "train_flux.sh").read_text()


def test_what_is_missing_is_said_before_anything_starts(tmp_path):
    (tmp_path / "flux.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    done = train(tmp_path)
    assert done.returncode == 2
    assert "start.pkl" in done.stderr
    done = train(
        tmp_path,
        FLUX_SNAPSHOT_PATH=str(ROOT / "exps" / "flux" / "start.pkl"),
        FLUX_MODEL_PATH="",
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 2
    assert "weights black-forest-labs/FLUX.1-dev: missing" in done.stdout
    assert not (tmp_path / "exps").exists()
