"""RDPO runs on Stable Diffusion 1, 3 and FLUX as on the digits: the shipped configurations on tiny pipelines of the real layouts."""

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from backends import check_backend
from solvers import Predictor, SolverTable, Spec, discrete, flowmatch, load_predictor, resolve_predictor_path, save_predictor
from training.config import load_config
from training.ppo import launch
from training.ppo.config import RDPOConfig, check
from training.ppo.prepare import load_start, settle
from training.start_tables import stable_diffusion_noise

sys.path.insert(0, str(Path(__file__).parents[2] / "backends"))
from tiny import save_tiny
from tiny_flow import save_flux, save_sd3

CONFIGS = Path(__file__).parents[3] / "training" / "ppo" / "cfgs"
REAL = ("sd15", "sd3_512", "sd3_1024", "flux_dev")
FAMILIES = {"sd15": ("ldm", save_tiny), "sd3_1024": ("sd3", save_sd3), "flux_dev": ("flux", save_flux)}
NODES = {"ldm": discrete(3, stable_diffusion_noise()), "sd3": flowmatch(3, shift=3.0), "flux": flowmatch(3, mu=0.46)}


@pytest.mark.parametrize("name", REAL)
def test_the_published_keys_have_the_published_values(name):
    config = load_config(RDPOConfig, CONFIGS / f"{name}.yaml")
    check(config)
    spec = settle(config, load_start(config)[0])
    assert check_backend(spec)[0] == {"sd15": "ldm", "sd3_512": "sd3", "sd3_1024": "sd3", "flux_dev": "flux"}[name]
    ppo = config.ppo
    assert (ppo.rloo_k, ppo.ppo_epochs, ppo.minibatch_size, ppo.clip_range, ppo.kl_coef, ppo.entropy_coef) == (4, 1, 4, 0.2, 0.0, 0.0)
    assert (ppo.learning_rate, ppo.max_grad_norm, ppo.policy) == (7e-5, 1.0, "mlp")
    assert ppo.dirichlet_concentration == (20 if name == "sd15" else 10)
    assert ppo.rollout_batch_size == (16 if name == "sd3_512" else 8)
    assert (ppo.steps, config.logging.save_interval) == ((20000, 200) if name == "flux_dev" else (99999, 500))
    assert config.model.guidance_rate == {"sd15": 7.5, "flux_dev": 3.5}.get(name, 4.5)
    assert (config.reward.type, config.reward.batch_size, config.reward.hps_version) == ("hps", 1 if name == "flux_dev" else 4, "v2.1")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shipped_configuration_on_a_tiny_model(tmp_path, name):
    backend, save = FAMILIES[name]
    options = {"model_name_or_path": str(save(tmp_path / "model"))} | ({} if backend == "ldm" else {"max_sequence_length": 8})
    schedule = "discrete" if backend == "ldm" else "flowmatch"
    spec = Spec(backend=backend, backend_config=options, num_steps=3, schedule_type=schedule)
    save_predictor(Predictor(SolverTable.uniform(2, 2), spec, NODES[backend]), tmp_path / "start.pkl")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cat {i}" for i in range(10)))
    overrides = [f"data.predictor_snapshot={tmp_path / 'start.pkl'}", f"data.prompt_csv={tmp_path / 'prompts.txt'}", "model.num_steps=null"]
    overrides += ["model.resolution=null", "model.flowmatch_mu=null", "reward.type=digits", "reward.weights_path=null"]
    overrides += ["ppo.steps=2", "ppo.learning_rate=0.01", "evaluation.images=2", "evaluation.rewards=[]"]
    told = [part for text in overrides for part in ("--override", text)]
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--output-root", str(tmp_path / "exps"), *told]
    result = CliRunner().invoke(launch.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    predictor = load_predictor(resolve_predictor_path(str(next((tmp_path / "exps").iterdir()))))
    assert predictor.spec.backend == backend
    assert torch.equal(predictor.sigmas, NODES[backend])
    assert predictor.provenance["reward"]["name"] == "digits"
