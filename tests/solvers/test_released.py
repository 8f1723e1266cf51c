"""The 43 released predictors as they are: exact tables, settings that hold here, nodes of the published code,
folders.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from problems import Mixture, noise
from published_writer import write_published
from released import PIXELS, TABLES, TEXT_TO_IMAGE, write_released

from solvers import (
    Predictor,
    PredictorError,
    SolverTable,
    Spec,
    flowmatch,
    load_predictor,
    resolve_predictor_path,
    sample,
    save_predictor,
    velocity_from_denoiser,
)

ROOT = Path(__file__).parents[2]
MODELS = {"sd3": "stabilityai/stable-diffusion-3-medium-diffusers", "flux": "black-forest-labs/FLUX.1-dev"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    write_released(folder)
    return folder


@pytest.mark.parametrize("name", TABLES)
def test_the_numbers_are_exact(folder, name):
    entry, predictor = TABLES[name], load_predictor(folder / name)
    arrays = predictor.table.arrays()
    assert {"r", "w"} <= arrays.keys() == {k for k in ("r", "w", "scale_dir", "scale_time") if k in entry}
    for key, value in arrays.items():
        torch.testing.assert_close(value, torch.tensor(entry[key], dtype=torch.float64), rtol=0, atol=1e-12)
    assert predictor.notes == ()
    assert predictor.spec.num_steps == entry["metadata"]["num_steps"]
    assert predictor.spec.max_order == (
        entry["metadata"]["max_order"] if entry["metadata"]["sampler_stu"] == "ipndm" else 1
    )


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_settings_are_mapped_to_where_they_hold(folder, name):
    metadata, spec = TABLES[name]["metadata"], load_predictor(folder / name).spec
    config = dict(spec.backend_config)
    if spec.backend == "ldm":
        assert config == {}
        return
    assert config.pop("model_name_or_path") == MODELS[spec.backend]
    assert config.pop("resolution") == metadata["img_resolution"]
    assert config == ({"torch_dtype": "bfloat16"} if spec.backend == "flux" else {})
    recorded = metadata["backend_config"]
    assert (spec.sigma_min, spec.sigma_max) == (recorded["sigma_min"], recorded["sigma_max"])
    assert (spec.flowmatch_mu, spec.flowmatch_shift) == (
        recorded.get("flowmatch_mu"),
        recorded.get("flowmatch_shift"),
    )


@pytest.mark.parametrize("name", PIXELS)
def test_a_backbone_that_is_not_ours_has_no_guidance_and_no_default(folder, name):
    spec = load_predictor(folder / name).spec
    assert (spec.backend, spec.guidance_rate) == (None, 1.0)
    assert spec.dataset_name == TABLES[name]["metadata"]["dataset_name"]


@pytest.mark.parametrize("name", TABLES)
def test_conversion_keeps_what_holds(folder, name, tmp_path):
    source = load_predictor(folder / name)
    save_predictor(source, tmp_path / "q.pkl")
    copy = load_predictor(tmp_path / "q.pkl")
    assert (copy.spec, copy.provenance) == (source.spec, source.provenance)
    assert all(torch.equal(copy.table.arrays()[k], v) for k, v in source.table.arrays().items())
    content = (tmp_path / "q.pkl").read_bytes()
    assert not any(
        word in content for word in (b"latent_resolution", b"model_id", b"enable_model_cpu_offload")
    )


def raw():
    return {"r_params": torch.zeros(3, 2), "weight_s": torch.zeros(3, 2)}


def test_what_is_unknown_or_dead_is_left_out_with_a_note(tmp_path):
    config = {
        "resolution": 512,
        "latent_resolution": 64,
        "vae_tiling": True,
        "scheduler": "x",
        "token": "hf_1",
        "flowmatch_mu": 0.9,
    }
    path = write_published(
        tmp_path / "p.pkl",
        raw(),
        backend="sd3",
        schedule_type="flowmatch",
        backend_config=config,
        flowmatch_shift=5.0,
    )
    predictor = load_predictor(path)
    assert predictor.spec.backend_config == {"resolution": 512}
    assert (predictor.spec.flowmatch_mu, predictor.spec.flowmatch_shift) == (None, None)
    unknown, mu, shift = predictor.notes
    assert unknown == "backend_config.scheduler, vae_tiling: no such option here, left out"
    assert "flowmatch_mu 0.9" in mu
    assert "flowmatch_shift 5.0" in shift


def test_an_own_name_goes_before_model_id_and_the_spec_before_its_options(tmp_path):
    config = {"model_name_or_path": "a", "model_id": "b", "sigma_max": 0.9, "flowmatch_mu": 0.5}
    path = write_published(
        tmp_path / "p.pkl", raw(), backend="flux", backend_config=config, sigma_max=1.0, img_resolution=1024
    )
    spec = load_predictor(path).spec
    assert spec.backend_config == {"model_name_or_path": "a", "resolution": 1024}
    assert (spec.sigma_max, spec.flowmatch_mu) == (1.0, 0.5)
    path = write_published(
        tmp_path / "q.pkl", raw(), backend="flux", backend_config={"model_id": "b"}, img_resolution=1024
    )
    assert load_predictor(path).spec.backend_config == {"model_name_or_path": "b", "resolution": 1024}


# with a denoiser of one's own


@pytest.mark.parametrize("name", PIXELS)
def test_a_table_of_another_backbone_samples_ones_own_denoiser(folder, name):
    """As README shows: from noise of an exactly solvable mixture to its data, though the table was learned on
    images.
    """
    predictor = load_predictor(folder / name)
    nodes = predictor.nodes(sigma_min=0.002, sigma_max=80.0)
    assert (len(nodes), nodes[0].item(), nodes[-1].item()) == (predictor.spec.num_steps, 80.0, 0.002)
    mixture = Mixture()
    start = 80 * noise(256, 1)
    states = sample(predictor.solver(), velocity_from_denoiser(mixture.denoiser), start, nodes)
    exact = mixture.solve(start, nodes[0], nodes[-1])
    assert torch.corrcoef(torch.stack([states[:, 0], exact[:, 0]]))[0, 1] > 0.95
    assert (states - exact).square().mean().sqrt() < exact.std() / (1 if len(nodes) == 3 else 2)


def test_nodes_that_the_ends_do_not_decide(folder, tmp_path):
    with pytest.raises(PredictorError, match="neither sigma_min and sigma_max are given"):
        load_predictor(folder / PIXELS[0]).nodes()
    with pytest.raises(PredictorError, match=r"'discrete'.*solvers\.discrete"):
        load_predictor(folder / "exps/sd15/sd15-best.pkl").nodes(0.03, 14.6)
    torch.testing.assert_close(
        load_predictor(folder / "exps/flux/flux-best.pkl").nodes(), flowmatch(9, mu=1.15)
    )


def test_a_learned_table_is_no_start_table_whatever_its_numbers():
    table = SolverTable.uniform(1, 1)
    assert Predictor(table, Spec()).is_start
    assert not Predictor(table, Spec(), provenance={"kind": "distilled"}).is_start


# folders


def test_a_folder_of_downloads_is_its_best_table(folder, tmp_path):
    exps = folder / "exps"
    assert {
        p.name: resolve_predictor_path(p.name, exps).name for p in exps.iterdir() if p.name[0] in "sf"
    } == {
        "sd15": "sd15-best.pkl",
        "sd3-512": "sd3-512-best.pkl",
        "sd3-1024": "sd3-1024-best.pkl",
        "flux": "flux-best.pkl",
    }
    assert resolve_predictor_path("sd15", exps, ("distilled", "start", "best")).name == "sd15-distilled.pkl"
    assert resolve_predictor_path("17", exps).parent.name.startswith("00017-cifar10")
    write_released(tmp_path, ["exps/sd15/sd15-start.pkl"])
    folder = tmp_path / "exps/sd15"
    assert resolve_predictor_path(str(folder)).name == "sd15-start.pkl"
    newest = folder / "network-snapshot-export-step000100.pkl"
    newest.write_bytes((folder / "sd15-start.pkl").read_bytes())
    assert resolve_predictor_path(str(folder)) == newest
    (folder / "distilled.pkl").write_bytes(newest.read_bytes())
    assert resolve_predictor_path(str(folder)).name == "distilled.pkl"
    (folder / "other-distilled.pkl").write_bytes(newest.read_bytes())
    with pytest.raises(
        PredictorError, match=r"several distilled tables: distilled\.pkl, other-distilled\.pkl"
    ):
        resolve_predictor_path(str(folder))


def test_the_published_names_of_our_own_tables(tmp_path):
    (tmp_path / "sd15").mkdir()
    (tmp_path / "sd15" / "start.pkl").write_bytes(b"x")
    assert resolve_predictor_path("sd15/sd15-start.pkl", tmp_path).name == "start.pkl"
    with pytest.raises(PredictorError, match=r"there are start.pkl"):
        resolve_predictor_path("sd15/sd15-best.pkl", tmp_path)


def test_downloads_overwrite_nothing_that_is_tracked():
    tracked = subprocess.run(["git", "ls-files", "exps"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert not set(TABLES) & set(tracked.stdout.split())
