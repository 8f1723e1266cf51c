"""The published README's commands, word for word, where the weights are tiny pipelines of the real layouts and sizes.

What stands for the weights is given through FLUX_MODEL_PATH, or added behind the command: --model-path or --override.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from published import make_models, move_in

from solvers import load_predictor

TRAIN_SD3 = "torchrun --master_port=12345 --nproc_per_node=1 -m training.ppo.launch --config training/ppo/cfgs/sd3_1024.yaml"
TRAIN_FLUX_SCRIPT = "./train_flux.sh"
TRAIN_FLUX = "python -m training.ppo.launch --config training/ppo/cfgs/flux_dev.yaml"
SAMPLE_SD15 = (
    "MASTER_PORT=12345 python sample.py --predictor_path exps/sd15/sd15-best.pkl --prompt-file src/prompts/test.txt "
    '--seeds "0-19" --batch 4 --outdir samples/sd15'
)
SAMPLE_SD3 = (
    'python sample_sd3.py --predictor exps/sd3-1024/sd3-1024-best.pkl --seeds "0" --outdir samples/sd3 --prompt "a cat on a red sofa"'
)
SAMPLE_FLUX = (
    "python sample_flux.py --predictor exps/flux/flux-best.pkl --model-id {model} --prompt-file src/prompts/test.txt "
    '--seeds "0" --outdir samples/flux'
)
TINY = (  # a step of a few images, without HPSv2's weights
    "ppo.rollout_batch_size=2",
    "ppo.rloo_k=2",
    "ppo.minibatch_size=2",
    "ppo.steps=1",
    "evaluation.images=2",
    "evaluation.rewards=[]",
    "reward.type=digits",
    "reward.weights_path=null",
    "model.backend_options.torch_dtype=float32",
)


SMALLER = {  # the same step in a configuration file
    "rollout_batch_size: 64": "rollout_batch_size: 2",
    "rloo_k: 4": "rloo_k: 2",
    "minibatch_size: 32": "minibatch_size: 2",
    "images: 64, batch: 4, rewards: [clip]": "images: 2, batch: 2",
    "type: hps": "type: digits",
    "  weights_path: weights/HPS_v2.1_compressed.pt\n": "",
    "  backend: flux\n": "  backend: flux\n  backend_options: {torch_dtype: float32}\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def project(tmp_path):
    """The project's folder after the downloads were copied into it."""
    return move_in(tmp_path)


def run(project: Path, command: str, *more: str, **variables: str) -> str:
    """Run a command line in the project's folder as a shell does, on the CPU; what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    line = " ".join([command, *map(shlex.quote, more)])
    done = subprocess.run(["bash", "-c", line], cwd=project, env=os.environ | told, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def overrides(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--override", text)]


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_sample_sd15(project):
    """On the digits' Stable Diffusion: 20 images of 512 pixels take minutes here (tests/test_moving_in.py makes one)."""
    said = run(project, SAMPLE_SD15, "--model-path", "backends/digits/sd")
    assert "epd from exps/sd15/sd15-best.pkl: serial depth 20, 30 evaluations an image, guidance 7.5" in said
    prompts = (project / "src/prompts/test.txt").read_text().splitlines()
    assert [(r["seed"], r["prompt"]) for r in manifest(project / "samples/sd15")] == list(enumerate(prompts[:20]))
    assert (project / "samples/sd15/000000/000019.png").is_file()


def test_sample_sd3(project, models):
    said = run(project, SAMPLE_SD3, "--model-path", str(models["sd3-1024"]))
    assert "1 images in samples/sd3" in said
    assert [r["prompt"] for r in manifest(project / "samples/sd3")] == ["a cat on a red sofa"]


def test_sample_flux(project, models):
    said = run(project, SAMPLE_FLUX.format(model=models["flux"]), "--dtype", "float32")
    assert "epd from exps/flux/flux-best.pkl: serial depth 16, 24 evaluations" in said


def test_the_empty_prompt_stands_in_for_none_with_a_note(project, models):
    said = run(project, "python sample_sd3.py --resolution 512 --seeds 0 --outdir samples/none", "--model-path", str(models["sd3-512"]))
    assert "epd from exps/sd3-512/sd3-512-best.pkl" in said
    assert "note: neither --prompt nor --prompt-file is given: the empty prompt is used" in said
    assert [r["prompt"] for r in manifest(project / "samples/none")] == [""]


def test_train_sd3(project, models):
    options = overrides(*TINY, f"model.backend_options.model_name_or_path={models['sd3-1024']}")
    said = run(project, TRAIN_SD3, *options)
    (folder,) = (project / "exps").glob("*-sd3_1024")
    assert f"run folder: exps/{folder.name}" in said
    resolved = (folder / "configs/resolved_config.yaml").read_text()
    assert "predictor_snapshot: exps/sd3-1024/sd3-1024-distilled.pkl" in resolved
    assert load_predictor(folder / "export/network-snapshot-export-best.pkl").spec.backend_config["resolution"] == 1024


def test_train_flux(project, models):
    """The script with the environment that it reads, and the single command: that one as a dry run, since the script runs it whole."""
    tiny = (project / "training/ppo/cfgs/flux_dev.yaml").read_text()
    for old, new in SMALLER.items():
        assert old in tiny
        tiny = tiny.replace(old, new)
    (project / "tiny.yaml").write_text(tiny)
    variables = {"FLUX_MODEL_PATH": str(models["flux"]), "FLUX_CONFIG": "tiny.yaml", "FLUX_MAX_STEPS": "1"}
    assert "network-snapshot-export-" in run(project, TRAIN_FLUX_SCRIPT, **variables)
    said = run(project, TRAIN_FLUX, "--dry-run", FLUX_MODEL_PATH=str(models["flux"]))
    assert "# dry run, a step: 64 images" in said
    assert "predictor_snapshot: exps/flux/flux-start.pkl" in said
