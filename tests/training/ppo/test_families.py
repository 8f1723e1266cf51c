"""RDPO runs on Stable Diffusion 1, 3 and FLUX as on the digits: the shipped configurations on tiny pipelines
of the real layouts.
"""

import pytest
import torch
from published import NAMES, make_models, write_released
from tiny import save_tiny
from tiny_flow import save_flux, save_sd3

from backends import check_backend
from solvers import (
    Predictor,
    SolverTable,
    Spec,
    discrete,
    flowmatch,
    load_predictor,
    resolve_predictor_path,
    save_predictor,
)
from training.config import load_config
from training.ppo.checks import check
from training.ppo.config import RDPOConfig
from training.ppo.setup import choose_exploration, find_start, merge_spec
from training.start_tables import stable_diffusion_noise

from ..runs import CPU, RDPO, invoke, overrides

CONFIGS = RDPO.configs
REAL = ("sd15", "sd3_512", "sd3_1024", "flux_dev")
FOLDERS = {"sd15": "sd15", "sd3_512": "sd3-512", "sd3_1024": "sd3-1024", "flux_dev": "flux"}
TINY_STEP = (
    "ppo.rollout_batch_size=2",
    "ppo.rloo_k=2",
    "ppo.minibatch_size=2",
    "ppo.rollout_chunk=2",
    "evaluation.images=2",
    "evaluation.interval=80",
    "evaluation.rewards=[]",
    "reward.type=digits",
    "reward.weights_path=null",
)
FAMILIES = {"sd15": ("ldm", save_tiny), "sd3_1024": ("sd3", save_sd3), "flux_dev": ("flux", save_flux)}
NODES = {
    "ldm": discrete(3, stable_diffusion_noise()),
    "sd3": flowmatch(3, shift=3.0),
    "flux": flowmatch(3, mu=0.46),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    write_released(folder)
    return folder


@pytest.mark.parametrize("name", REAL)
def test_published_means_the_published_value_of_every_key(name):
    config = load_config(RDPOConfig, CONFIGS / "published" / f"{name}.yaml")
    check(config)
    spec = merge_spec(config, find_start(config))
    assert (
        check_backend(spec)[0].name
        == {"sd15": "ldm", "sd3_512": "sd3", "sd3_1024": "sd3", "flux_dev": "flux"}[name]
    )
    ppo, model, reward = config.ppo, config.model, config.reward
    assert (
        ppo.rloo_k,
        ppo.ppo_epochs,
        ppo.minibatch_size,
        ppo.clip_range,
        ppo.kl_coef,
        ppo.entropy_coef,
    ) == (4, 1, 4, 0.2, 0.0, 0.0)
    assert (ppo.learning_rate, ppo.max_grad_norm, ppo.policy, ppo.scale_std) == (7e-5, 1.0, "mlp", 0.05)
    assert (ppo.group_noise, ppo.baseline, ppo.max_log_change, ppo.kl_target) == (
        "independent",
        "mixed",
        20,
        None,
    )
    assert ppo.dirichlet_concentration == (20 if name == "sd15" else 10)
    assert ppo.rollout_batch_size == (16 if name == "sd3_512" else 8)
    assert (ppo.steps, config.logging.save_interval) == ((20000, 200) if name == "flux_dev" else (99999, 500))
    assert (ppo.train_scale_dir, ppo.train_scale_time) == (
        (False, False) if name == "flux_dev" else (None, None)
    )
    assert (model.guidance_rate, model.num_steps, model.num_points) == (
        {"sd15": 7.5, "flux_dev": 3.5}.get(name, 4.5),
        None,
        None,
    )
    assert (reward.type, reward.batch_size, reward.hps_version, reward.enable_amp) == (
        "multi",
        1 if name == "flux_dev" else 4,
        "v2.1",
        True,
    )
    assert {head for head, weight in reward.multi.weights.items() if weight} == {"hps"}
    assert config.data.predictor_snapshot.endswith("-start.pkl")


@pytest.mark.parametrize("name", REAL)
def test_the_plain_names_hold_the_settings_that_learn_on_the_digits(name):
    config, digits = (load_config(RDPOConfig, CONFIGS / f"{n}.yaml") for n in (name, "digits"))
    check(config)
    choose_exploration(config.ppo, from_equal=False)
    assert vars(config.ppo) | {
        "rollout_chunk": 64,
        "train_scale_dir": None,
        "train_scale_time": None,
    } == vars(digits.ppo)
    assert "/" not in config.data.predictor_snapshot.removeprefix("exps/"), (
        "a folder: its distilled table, where there is one"
    )


@pytest.mark.parametrize("table, concentration, rate", [("start", 100.0, 0.03), ("distilled", 1000.0, 0.01)])
def test_exploration_is_wide_from_equal_points_and_narrow_from_a_learned_table(
    downloads, table, concentration, rate
):
    snapshot = downloads / f"exps/sd15/sd15-{table}.pkl"
    settings = overrides(f"data.predictor_snapshot={snapshot}")
    output = invoke(RDPO.main, "--config", CONFIGS / "sd15.yaml", "--dry-run", *settings)
    assert f"  dirichlet_concentration: {concentration}\n" in output
    assert f"  learning_rate: {rate}\n" in output
    assert ("distil first" in output) == (table == "start")


@pytest.mark.parametrize("name", [*REAL, *(f"published/{name}" for name in REAL)])
def test_a_dry_run_prints_the_plan_and_what_is_missing(name, monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[2])
    output = invoke(RDPO.main, "--config", CONFIGS / f"{name}.yaml", "--dry-run")
    assert "# dry run, a step: " in output
    stem = name.rsplit("/", 1)[-1]
    assert f"note: nothing was learned yet in the start table exps/{FOLDERS[stem]}/start.pkl" in output
    assert f"distil first: ./launch.sh distill {stem}" in output
    assert "note: before a run: reward " in output


QUICK = [
    name for name in NAMES if name.startswith("sd3-512")
]  # tests/test_published_training.py trains at 1024 pixels


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_one_step_from_a_published_table(tmp_path, models, downloads, name):
    backbone = name.split("/")[0]
    config = CONFIGS / {"sd15": "sd15.yaml", "flux": "flux_dev.yaml"}.get(
        backbone, backbone.replace("-", "_") + ".yaml"
    )
    settings = overrides(
        f"data.predictor_snapshot={downloads / 'exps' / name}",
        f"model.backend_options.model_name_or_path={models[backbone]}",
        *TINY_STEP,
        "model.backend_options.torch_dtype=float32",
    )
    arguments = ("--config", config, *CPU, "--output-root", tmp_path / "exps", *settings)
    invoke(RDPO.main, *arguments, "--dry-run")
    invoke(RDPO.main, *arguments, "--max-steps", "1")
    exported = load_predictor(resolve_predictor_path(str(next((tmp_path / "exps").iterdir()))))
    source = load_predictor(downloads / "exps" / name)
    assert exported.spec.num_steps == source.spec.num_steps
    assert exported.spec.backend_config.get("resolution") == source.spec.backend_config.get("resolution")


def test_keys_without_a_meaning_here_are_accepted_with_a_note(tmp_path):
    (tmp_path / "published.yaml").write_text(PUBLISHED)
    output = invoke(RDPO.main, "--config", tmp_path / "published.yaml", "--dry-run")
    for key in ("reward.cache_dir", "reward.multi.imagereward.med_config", "reward.multi.clip.cache_dir"):
        assert f"note: {key} is not used: " in output
    assert "note: model.resolution 1024 is not used: ldm has the model's own" in output


PUBLISHED = """
run: {output_root: exps, run_name: sd15, seed: 0}
data: {predictor_snapshot: exps/sd15/sd15-start.pkl, prompt_csv: null}
model:
  {dataset_name: ms_coco, guidance_type: cfg, guidance_rate: 7.5, schedule_type: discrete,
   schedule_rho: 1.0, num_steps: null,
   num_points: null, backend: ldm, resolution: 1024, backend_options: {}, sigma_min: null, sigma_max: null}
reward:
  type: multi
  weights_path: weights/HPS_v2.1_compressed.pt
  batch_size: 4
  enable_amp: true
  hps_version: v2.1
  cache_dir: weights
  multi:
    weights: {hps: 1.0, pickscore: 0.0, imagereward: 0.0, clip: 0.0, aesthetic: 0.0}
    pickscore: {model: yuvalkirstain/PickScore_v1, processor: laion/CLIP-ViT-H-14-laion2B-s32B-b79K}
    imagereward: {checkpoint: weights/ImageReward.pt, med_config: weights/med_config.json, cache_dir: weights}
    clip: {cache_dir: weights/clip}
    aesthetic: {predictor_path: weights/sac+logos+ava1-l14-linearMSE.pth, clip_path: null}
ppo:
  {rollout_batch_size: 8, rloo_k: 4, ppo_epochs: 1, minibatch_size: 4, learning_rate: 7.0e-5,
   clip_range: 0.2, kl_coef: 0.0,
   entropy_coef: 0.0, max_grad_norm: 1.0, decode_rgb: true, steps: 99999, dirichlet_concentration: 20}
logging: {log_interval: 1, save_interval: 500}
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shipped_configuration_on_a_tiny_model(tmp_path, name):
    backend, save = FAMILIES[name]
    options = {"model_name_or_path": str(save(tmp_path / "model"))} | (
        {} if backend == "ldm" else {"max_sequence_length": 8}
    )
    schedule = "discrete" if backend == "ldm" else "flowmatch"
    spec = Spec(backend=backend, backend_config=options, num_steps=3, schedule_type=schedule)
    save_predictor(Predictor(SolverTable.uniform(2, 2), spec, NODES[backend]), tmp_path / "start.pkl")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cat {i}" for i in range(10)))
    settings = overrides(
        f"data.predictor_snapshot={tmp_path / 'start.pkl'}",
        f"data.prompt_csv={tmp_path / 'prompts.txt'}",
        "model.num_steps=null",
        "model.resolution=null",
        "model.flowmatch_mu=null",
        "reward.type=digits",
        "reward.weights_path=null",
        "ppo.steps=2",
        "ppo.rollout_batch_size=8",
        "ppo.minibatch_size=4",
        "evaluation.images=2",
        "evaluation.rewards=[]",
    )
    config = CONFIGS / f"{name}.yaml"
    invoke(RDPO.main, "--config", config, "--output-root", tmp_path / "exps", *settings)
    predictor = load_predictor(resolve_predictor_path(str(next((tmp_path / "exps").iterdir()))))
    assert predictor.spec.backend == backend
    assert torch.equal(predictor.sigmas, NODES[backend])
    assert predictor.provenance["reward"]["name"] == "digits"
