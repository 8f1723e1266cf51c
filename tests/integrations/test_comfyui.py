"""The ComfyUI node on a stub of its contracts, to-comfyui, and the real core where COMFYUI_PATH is set."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import noise_scheduler
from click.testing import CliRunner
from comfy_stub import Cond, Flow, Guider, Model, Noise, load_node, modules
from reference import EXPS, random_table, table_file
from scheduler_cases import KINDS, noise_nodes

from integrations import comfyui_export
from integrations.k_diffusion import LearnedTable
from solvers import flowmatch, load_predictor, sample, velocity_from_denoiser
from solvers.predictor.__main__ import main

CONFIG = noise_scheduler().config


def export(*arguments):
    done = CliRunner().invoke(main, ["to-comfyui", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    """A ComfyUI folder with the node and tables of each kind, put there by the one command."""
    root, tables = tmp_path_factory.mktemp("ComfyUI"), tmp_path_factory.mktemp("tables")
    (root / "custom_nodes").mkdir()
    paths = [random_table(kind, noise_nodes(CONFIG), tables, "ldm") for kind in KINDS]
    (tables / "flow").mkdir()
    flow = random_table("epd", flowmatch(4, shift=3.0), tables / "flow", "sd3").rename(tables / "flow.pkl")
    export(*paths, flow, root)
    return root, {path.stem: path for path in [*paths, flow]}


@pytest.fixture(scope="module")
def node(installation):
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules(installation[0] / "models").items():
            patch.setitem(sys.modules, name, module)
        package = load_node(installation[0] / "custom_nodes" / "epd_solver")
        extension = asyncio.run(package.comfy_entrypoint())
        (node,) = asyncio.run(extension.get_node_list())
        yield node


def guider(conventions, images=1, **condition) -> Guider:
    torch.manual_seed(0)
    parts = {
        name: [{"model_conds": {"c_crossattn": Cond(torch.randn(images, 3))}} | condition]
        for name in ("positive", "negative")
    }
    return Guider(Model(conventions), parts)


def run(node, name, guide, images=2, parallel=True, mask=None, options=None):
    """The node's sampler on its own noise levels: latents, the noise levels, callbacks, noise."""
    sampler, sigmas = node.execute(f"{name}.json", parallel).result
    noise = torch.randn(images, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    seen = []
    extra = {"model_options": options or {}, "seed": 0}
    latent = torch.zeros_like(noise) if mask is None else torch.full_like(noise, 0.3)
    out = sampler.sample(guide, sigmas, extra, lambda *known: seen.append(known), noise, latent, mask)
    return out, sigmas, seen, noise


def test_the_schema(node):
    schema = node.define_schema()
    assert schema.node_id == "EPDSampler"
    (table, parallel), outputs = schema.inputs, schema.outputs
    assert table[:2] == ("Combo", "table")
    assert table[2]["options"] == [
        "epd.json",
        "flow.json",
        "plugin.json",
        "tableau1.json",
        "tableau2.json",
        "wide2.json",
    ]
    assert parallel[:2] == ("Boolean", "parallel_points")
    assert parallel[2]["default"] is True
    assert outputs == [("Sampler",), ("Sigmas",)]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", [*KINDS, "flow"])
def test_samples_are_those_of_the_projects_own_solver(node, installation, name, parallel):
    predictor = load_predictor(installation[1][name])
    guide = guider(Flow() if name == "flow" else Noise())
    out, sigmas, seen, noise = run(node, name, guide, parallel=parallel)
    levels = LearnedTable.from_predictor(installation[1][name]).nodes
    assert sigmas.tolist() == pytest.approx([*levels[:-1], 0.0])
    start = noise * (1.0 if name == "flow" else (1 + sigmas[0].item() ** 2) ** 0.5)
    velocity = velocity_from_denoiser(lambda x, sigma: guider(Noise())(x, sigma.float()))
    expected = sample(predictor.solver(), velocity, start, predictor.sigmas)
    assert (out - expected).abs().max() < 1e-4
    assert [known[0] for known in seen] == list(range(len(sigmas) - 1))
    cost = predictor.cost()
    assert len(guide.calls) == (cost.depth if parallel else cost.evaluations)


SITUATIONS = {
    "a noise mask for several images": {"mask": torch.ones(2, 1, 4, 4)},
    "a condition with a timestep range": {"timestep_start": 3.0, "timestep_end": 0.5},
    "a ControlNet": {"control": object()},
    "hooks on a condition": {"hooks": object()},
    "GLIGEN": {"gligen": object()},
    "a masked condition": {"mask_of_condition": torch.ones(1, 4, 4)},
    "a condition of 3 rows for 2 images": {"images": 3},
    "a model function wrapper": {"options": {"model_function_wrapper": print}},
    "wrappers of the model": {"options": {"transformer_options": {"wrappers": {"calc": {"x": [print]}}}}},
}


@pytest.mark.parametrize("reason", SITUATIONS)
def test_situations_in_which_points_run_one_after_another(node, installation, reason):
    """They are detected, and the result is that of the switch turned off."""
    situation = dict(SITUATIONS[reason])
    mask, options, images = (
        situation.pop("mask", None),
        situation.pop("options", None),
        situation.pop("images", 1),
    )
    if "mask_of_condition" in situation:
        situation["mask"] = situation.pop("mask_of_condition")
    results = []
    for parallel in (True, False):
        guide = guider(Noise(), images, **situation)
        results.append(run(node, "epd", guide, parallel=parallel, mask=mask, options=options)[0])
        assert guide.calls == [2] * 9
    assert torch.equal(*results)
    module = sys.modules["epd_solver_node.sampling"]
    model = type("Denoiser", (), {"inner_model": guider(Noise(), images, **situation)})()
    assert module.why_sequential(model, 2, {"denoise_mask": mask, "model_options": options}) == reason


def test_a_mask_for_one_image_is_no_obstacle(node):
    guides = [guider(Noise()), guider(Noise())]
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    outs = [
        run(node, "epd", g, images=1, parallel=p, mask=mask)[0]
        for g, p in zip(guides, (True, False), strict=True)
    ]
    assert torch.allclose(*outs, atol=1e-5)
    assert guides[0].calls == [1, 2] * 3


def test_a_timestep_range_within_a_level_would_go_wrong_in_one_batch(node):
    """What the refusal is for: the stub decides by a batch's first noise level, as ComfyUI does."""
    from integrations.k_diffusion import sample_epd

    sampler, sigmas = node.execute("epd.json", True).result
    table, x = sampler.extra_options["table"], torch.randn(1, 3, 4, 4)
    levels = [table.sigmas[s] for s in table.levels[1]]
    edge = sum(levels) / 2
    outs = []
    for points in (0, 1):
        model = guider(Noise(), timestep_start=edge)
        outs.append(sample_epd(model, x, sigmas, disable=True, table=table, points_per_call=points))
    assert (outs[0] - outs[1]).abs().max() > 1e-3


def test_a_file_that_is_no_table_is_one_clear_error(node, installation):
    file = installation[0] / "models" / "epd_tables" / "bad.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json: learned table: format is \{\}"):
        node.execute("bad.json", True)
    file.unlink()


def test_a_table_that_changes_is_read_again(node, installation):
    file = installation[0] / "models" / "epd_tables" / "epd.json"
    before = node.fingerprint_inputs("epd.json", True)
    os.utime(file, (before + 10, before + 10))
    assert node.fingerprint_inputs("epd.json", True) != before


def test_the_command_writes_tables_alone_where_there_is_no_comfyui(tmp_path):
    out = export(table_file("epd-g7.5-d4"), next(EXPS.rglob("sd15/start.pkl")), tmp_path / "tables")
    names = sorted(p.name for p in (tmp_path / "tables").iterdir())
    assert names == ["epd-g7.5-d4.json", "sd15-start.json"]
    assert str(tmp_path / "tables" / "sd15-start.json") in out
    data = json.loads((tmp_path / "tables" / "epd-g7.5-d4.json").read_text())
    assert data["made_for"]["guidance"] == 7.5
    with pytest.raises(ValueError, match=r"a second table of the name epd-g7.5-d4.json"):
        export(table_file("epd-g7.5-d4"), table_file("epd-g7.5-d4"), tmp_path / "tables")


def test_the_installed_node_needs_nothing_of_the_project(installation):
    """Its files import torch, tqdm, ComfyUI and each other."""
    import ast

    folder = installation[0] / "custom_nodes" / "epd_solver"
    assert {p.name for p in folder.glob("*")} >= {"__init__.py", "nodes.py", "sampling.py", "sample_epd.py"}
    allowed = {"torch", "tqdm", "comfy", "comfy_api", "folder_paths", *sys.stdlib_module_names}
    for file in folder.glob("*.py"):
        assert not file.is_symlink()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed


def test_the_folder_in_the_repository_can_be_linked():
    """Its executor is a link to the one of k-diffusion, which a link to the folder leads to as well."""
    assert (comfyui_export.NODE / "sample_epd.py").read_bytes() == comfyui_export.EXECUTOR.read_bytes()


def test_the_example_workflow_fits_the_node(node):
    workflow = json.loads((comfyui_export.NODE / "example_workflow.json").read_text())
    (own,) = [part["inputs"] for part in workflow.values() if part["class_type"] == "EPDSampler"]
    assert list(own) == [name for _, name, _ in node.define_schema().inputs]
    (number,) = [number for number, part in workflow.items() if part["class_type"] == "EPDSampler"]
    (custom,) = [part["inputs"] for part in workflow.values() if part["class_type"] == "SamplerCustom"]
    assert (custom["sampler"], custom["sigmas"]) == ([number, 0], [number, 1])
    links = [
        value for part in workflow.values() for value in part["inputs"].values() if isinstance(value, list)
    ]
    assert all(source in workflow for source, _ in links)


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH is not set")
def test_the_real_core(installation):
    """In a process of its own: the node loads, and its sampler runs in the real KSAMPLER."""
    code = Path(__file__).with_name("comfy_real.py")
    folder = installation[0] / "custom_nodes" / "epd_solver"
    table = installation[0] / "models" / "epd_tables" / "flow.json"
    done = subprocess.run(
        [sys.executable, code, folder, table],
        cwd=os.environ["COMFYUI_PATH"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")
