"""The published README's training commands, word for word, where the weights are tiny pipelines of the real
layouts and sizes.

What stands for the weights is given through FLUX_MODEL_PATH, or added behind the command as --override.
"""

from published import run

from solvers import load_predictor

TRAIN_SD3 = (
    "torchrun --master_port=12345 --nproc_per_node=1 -m training.ppo.launch --config"
    " training/ppo/cfgs/sd3_1024.yaml"
)
TRAIN_FLUX_SCRIPT = "./train_flux.sh"
TRAIN_FLUX = "python -m training.ppo.launch --config training/ppo/cfgs/flux_dev.yaml"
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


def overrides(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--override", text)]


def test_train_sd3(project, models):
    options = overrides(*TINY, f"model.backend_options.model_name_or_path={models['sd3-1024']}")
    text = run(project, TRAIN_SD3, *options)
    (folder,) = (project / "exps").glob("*-sd3_1024")
    assert f"run folder: exps/{folder.name}" in text
    resolved = (folder / "configs/resolved_config.yaml").read_text()
    assert "predictor_snapshot: exps/sd3-1024/sd3-1024-distilled.pkl" in resolved
    spec = load_predictor(folder / "export/network-snapshot-export-best.pkl").spec
    assert spec.backend_config["resolution"] == 1024


def test_train_flux_script(project, models):
    """From the downloaded start table to an exported predictor, with the variables that the script reads."""
    text = (project / "training/ppo/cfgs/flux_dev.yaml").read_text()
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    (project / "tiny.yaml").write_text(text)
    (project / "prompts.txt").write_text("".join(f"a cat number {n}\n" for n in range(7)))
    variables = {
        "FLUX_MODEL_PATH": str(models["flux"]),
        "FLUX_CONFIG": "tiny.yaml",
        "FLUX_PROMPT_CSV": "prompts.txt",
        "FLUX_RUN_NAME": "tiny",
        "FLUX_MAX_STEPS": "1",
        "FLUX_EXPORT_CHECKPOINT": "step000001.pt",
    }
    text = run(project, TRAIN_FLUX_SCRIPT, **variables)
    assert "network-snapshot-export-step000001.pkl" in text
    (folder,) = (project / "exps").glob("*-tiny")
    assert (folder / "export/export-manifest-step000001.json").is_file()
    assert load_predictor(folder / "export/network-snapshot-export-best.pkl").spec.backend == "flux"
    resolved = (folder / "configs/resolved_config.yaml").read_text()
    assert "predictor_snapshot: exps/flux/flux-start.pkl" in resolved
    assert "prompt_csv: prompts.txt" in resolved


def test_train_flux(project, models):
    """The single command, as a dry run: the script runs it whole."""
    text = run(project, TRAIN_FLUX, "--dry-run", FLUX_MODEL_PATH=str(models["flux"]))
    assert "# dry run, a step: 64 images" in text
    assert "predictor_snapshot: exps/flux/flux-start.pkl" in text
