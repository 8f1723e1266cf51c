"""sample_epd in k-diffusion's conventions, with a wrapper written here and with k-diffusion's own."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
from cases import noise_scheduler
from reference import CLOSE, random_table, table_file
from scheduler_cases import BROKEN, KINDS, SHIPPED, noise_nodes

from integrations.k_diffusion import LearnedTable, sample_epd
from integrations.tables import table_data
from solvers import SolverTable, load_predictor, sample, velocity_from_denoiser

CONFIG = noise_scheduler().config


class Denoiser:
    """D = x - sigma eps(x / sqrt(1 + sigma^2), t), t by interpolation of log sigma."""

    def __init__(self, unet, alphas_cumprod, text):
        self.unet, self.text = unet, text
        self.log_sigmas = (0.5 * (1 / alphas_cumprod.double() - 1).log()).numpy()

    def __call__(self, x, sigma):
        t = numpy.interp(sigma.double().log().numpy(), self.log_sigmas, numpy.arange(1000))
        size = sigma.float().view(-1, 1, 1, 1)
        text = self.text.repeat(len(x) // len(self.text), 1, 1)
        eps = self.unet(x / (size**2 + 1).sqrt(), torch.tensor(t).float(), text).sample
        return x - size * eps


def k_diffusions_wrapper(backend, text):
    """k_diffusion.external alone: importing the package needs scikit-image, clip and pkg_resources."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
    folder = Path(spec.origin).parent
    package = types.ModuleType("k_diffusion_alone")
    package.__path__ = [str(folder)]
    names = ["sampling", "utils"]
    sys.modules["k_diffusion_alone"] = package
    for name in names:
        sys.modules[f"k_diffusion_alone.{name}"] = types.ModuleType(name)
        setattr(package, name, sys.modules[f"k_diffusion_alone.{name}"])
    package.utils.append_dims = lambda x, ndim: x[
        (..., *[None] * (ndim - x.ndim))
    ]  # all that the wrappers take
    external = importlib.import_module("k_diffusion_alone.external")

    def eps(x, t, **options):
        return backend.pipe.unet(x.float(), t.float(), text.repeat(len(x) // len(text), 1, 1)).sample

    return external.DiscreteEpsDDPMDenoiser(eps, backend.pipe.scheduler.alphas_cumprod, quantize=False)


@pytest.fixture(scope="module", params=["here", "k_diffusion"])
def denoiser(request, digits):
    backend = digits["ldm"]
    with torch.no_grad():
        text = backend.encode(["a 3", "a photo of 7"], 1.0).positive["text"]
    if request.param == "k_diffusion":
        return k_diffusions_wrapper(backend, text)
    return Denoiser(backend.pipe.unet, backend.pipe.scheduler.alphas_cumprod, text)


def start(predictor, images=2):
    noise = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return noise * predictor.sigmas[0].item()


@pytest.mark.parametrize("points", [1, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_projects_own_solver(denoiser, kind, points):
    path = table_file(SHIPPED["ldm", kind])
    predictor, table = load_predictor(path), LearnedTable.from_predictor(path)
    x, nodes = start(predictor), torch.tensor(table.nodes)
    with torch.no_grad():
        expected = sample(predictor.solver(), velocity_from_denoiser(denoiser), x, predictor.sigmas)
    assert (
        sample_epd(denoiser, x, nodes, disable=True, table=table, points_per_call=points) - expected
    ).abs().max() < CLOSE
    assert (expected - x).abs().max() > 1


def linear(x, sigma, **extra):
    """The exact denoiser of a unit normal distribution."""
    return x / (1 + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2)


@pytest.fixture
def table(tmp_path):
    return LearnedTable.from_predictor(random_table("epd", noise_nodes(CONFIG), tmp_path, "ldm"))


@pytest.mark.parametrize("points, rows", [(1, [2] * 9), (0, [2, 4] * 3), (2, [2, 4] * 3)])
def test_rows_of_a_call(table, points, rows):
    seen = []

    def model(x, sigma, **extra):
        assert len(x) == len(sigma)
        seen.append(len(x))
        return linear(x, sigma)

    sample_epd(
        model, torch.randn(2, 3), torch.tensor(table.nodes), disable=True, table=table, points_per_call=points
    )
    assert seen == rows


def test_points_are_in_point_major_order(table):
    """Row m * B + b is point m of image b, as tiled conditions are."""
    levels = []

    def model(x, sigma, **extra):
        levels.append(sigma.tolist())
        return linear(x, sigma)

    sample_epd(
        model, torch.randn(2, 3), torch.tensor(table.nodes), disable=True, table=table, points_per_call=0
    )
    first, second = levels[1][0], levels[1][2]
    assert levels[1] == [first, first, second, second]
    assert first != second


def test_extra_arguments_and_the_callback(table):
    """The callback comes once a step, with the state at its node and the denoised one."""
    seen, given = [], []

    def model(x, sigma, cond=None):
        given.append(cond)
        return linear(x, sigma)

    x = torch.randn(2, 3) * table.nodes[0]
    nodes = torch.tensor(table.nodes)
    result = sample_epd(
        model, x, nodes, extra_args={"cond": 5}, callback=seen.append, disable=True, table=table
    )
    assert set(given) == {5}
    assert [known["i"] for known in seen] == [0, 1, 2]
    assert torch.equal(seen[0]["x"], x)
    for known, node in zip(seen, table.nodes, strict=False):
        assert known["sigma"].item() == known["sigma_hat"].item() == pytest.approx(node)
        assert torch.allclose(known["denoised"], linear(known["x"], known["sigma"].expand(2)))
    assert result.dtype == x.dtype


@pytest.mark.parametrize(
    "kind, calls", [("epd", [0, 1, 2]), ("tableau1", [0, 1, 2]), ("wide2", [0, 1, 2, 3, 4, 5])]
)
def test_the_callback_comes_at_each_level_of_a_whole_tableau(kind, calls, tmp_path):
    table = LearnedTable.from_predictor(random_table(kind, noise_nodes(CONFIG), tmp_path, "ldm"))
    seen = []
    sample_epd(
        linear, torch.randn(1, 3), torch.tensor(table.nodes), callback=seen.append, disable=True, table=table
    )
    assert [known["i"] for known in seen] == calls


@pytest.mark.parametrize("node", [1, 2])
def test_a_run_may_begin_at_a_node_of_an_epd_table(node, tmp_path):
    path = random_table("epd", noise_nodes(CONFIG), tmp_path, "ldm")
    predictor, table = load_predictor(path), LearnedTable.from_predictor(path)
    x, rest = (
        torch.randn(2, 3).double(),
        SolverTable(**{k: v[node:] for k, v in predictor.table.arrays().items()}),
    )
    solver = type(predictor.solver())(rest)
    expected = sample(solver, velocity_from_denoiser(linear), x, predictor.sigmas[node:])
    seen = []
    sigmas = torch.tensor([*table.nodes[node:-1], 0.0])
    actual = sample_epd(linear, x, sigmas, callback=seen.append, disable=True, table=table)
    assert torch.allclose(actual, expected, atol=1e-5)
    assert [known["i"] for known in seen] == list(range(3 - node))


def test_other_noise_levels_are_refused(tmp_path, table):
    x = torch.randn(1, 3)
    with pytest.raises(
        ValueError, match=r"sigmas are \[14.0, 5.0, 0.0\], expected its own noise levels: 14.6146,"
    ):
        sample_epd(linear, x, torch.tensor([14.0, 5.0, 0.0]), disable=True, table=table)
    whole = LearnedTable.from_predictor(random_table("tableau1", noise_nodes(CONFIG), tmp_path, "ldm"))
    with pytest.raises(ValueError, match=r"the first noise level is .*: all 4 noise levels"):
        sample_epd(linear, x, torch.tensor(whole.nodes[1:]), disable=True, table=whole)


@pytest.mark.parametrize("kind", KINDS)
def test_json_keeps_every_number(kind, tmp_path):
    path = random_table(kind, noise_nodes(CONFIG), tmp_path, "ldm")
    (tmp_path / "table.json").write_text(json.dumps(table_data(path)))
    assert LearnedTable.from_json(tmp_path / "table.json") == LearnedTable.from_predictor(path)


@pytest.mark.parametrize(
    "name", [n for n in BROKEN if n not in ("not a dict", "another count", "a level of text")]
)
def test_a_broken_table_is_one_clear_error(name, tmp_path):
    """The same damage as in a scheduler's configuration, and the same words."""
    damage, message = BROKEN[name]
    data = table_data(random_table("epd", noise_nodes(CONFIG, 3), tmp_path, "ldm"))
    (tmp_path / "table.json").write_text(json.dumps(damage(data)))
    with pytest.raises(
        ValueError, match=message.replace(r"\[", r"[\(\[]").replace(r"\]", r"[\)\]]")
    ) as caught:
        LearnedTable.from_json(tmp_path / "table.json")
    assert str(caught.value).startswith(f"{tmp_path}/table.json: learned table: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "epd-table/2"}', "[" * 100000, "3"])
def test_a_file_that_is_no_table_is_named(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t.json: ") as caught:
        LearnedTable.from_json(tmp_path / "t.json")
    assert len(str(caught.value)) < 600
    with pytest.raises(ValueError, match=r"none.json"):
        LearnedTable.from_json(tmp_path / "none.json")
