"""The cost that a dry run prints, against what the run then costs."""

import re

import pytest
from safetensors.torch import load_file

from backends import check_backend, load_backend
from backends.gaussian import GaussianMixture
from solvers import Spec
from training import estimates
from training.config import load_config
from training.distill import launch as distill
from training.distill.config import DistillConfig

from .runs import DISTILL, RDPO, invoke


def numbers(line: str, *names: str) -> list[float]:
    """The numbers that stand after some words."""
    return [float(re.search(rf"{name} ([\d.]+)", line).group(1)) for name in names]


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """The rows of each call of the gaussian backbone."""
    rows, original = [], GaussianMixture._eps
    monkeypatch.setattr(
        GaussianMixture,
        "_eps",
        lambda self, x, sigma, logits: rows.append(len(x)) or original(self, x, sigma, logits),
    )
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("evaluation.depths=[3]", "student.afs=true", "teacher.solver=heun", "teacher.check=0"),
        ("student.kind=tableau", "student.start=baseline", "student.depth=4", "evaluation.baselines=[euler]"),
    ],
)
def test_rows_and_disk_of_a_distillation(tmp_path, rows, settings):
    out = invoke(DISTILL.main, *DISTILL.arguments(tmp_path, "cost", *settings, more=("--dry-run",)))
    assert rows == []
    DISTILL.start(tmp_path, "cost", *settings)
    # the pairs off which the second moments of a tableau's start are read are not counted
    moments = 2 * 16 * 7 if "student.kind=tableau" in settings else 0
    parts = ("teacher", "its check", "baselines", "training", "held-out evaluations")
    total, *counts = numbers(out, "network rows:", *parts)
    assert sum(counts) == total == sum(rows) - moments
    states = [load_file(p)["states"] for p in (tmp_path / "banks").rglob("shard*")]
    assert numbers(out, "bank on disk:") == pytest.approx([sum(s.nbytes for s in states) / 1e6], rel=0.01)
    assert "estimate" not in out


def test_rows_of_rdpo(tmp_path, rows):
    out = invoke(RDPO.main, *RDPO.arguments(tmp_path, "cost", more=("--dry-run",)))
    RDPO.start(tmp_path, "cost")
    total, *counts = numbers(out, "network rows:", "rollouts", "held-out evaluations")
    assert sum(counts) == total == sum(rows)


@pytest.mark.parametrize("family", ["ldm", "sd3", "flux"])
def test_latents_of_the_embedded_families(family):
    spec = Spec(backend="digits", backend_config={"family": family})
    backend = load_backend(spec, "cpu")
    assert estimates.SMALL["digits"] == backend.latent_shape
    assert (
        estimates.rows_an_evaluation(Spec(**vars(spec) | {"guidance_rate": 4.5}))
        == 1 + backend.cfg_doubles_rows
    )
    assert estimates.rows_an_evaluation(Spec(**vars(spec) | {"guidance_rate": 1.0})) == 1


@pytest.mark.parametrize(
    "name, elements, more, memory",
    [
        (
            "sd15",
            4 * 64 * 64,
            (),
            (
                "12 GB = weights 1.7 GB of the network and 0.2 GB of text encoders + activations of 4 rows of"
                " 2.5 GB"
            ),
        ),
        (
            "sd15",
            4 * 64 * 64,
            ("train.parallel_points=false", "backend.config.offload=true"),
            "7 GB = weights 1.7 GB of the network and 0.0 GB",
        ),
        (
            "sd3_1024",
            16 * 128 * 128,
            (),
            (
                "18 GB = weights 4.1 GB of the network and 11.0 GB of text encoders + activations of 4 rows"
                " of 0.6 GB"
            ),
        ),
        (
            "sd3_512",
            16 * 64 * 64,
            (),
            "weights 4.1 GB of the network and 11.0 GB of text encoders + activations of",
        ),
        (
            "flux_dev",
            16 * 128 * 128,
            ("backend.config.offload=true",),
            "28 GB = weights 23.8 GB of the network and 0.0 GB",
        ),
        (
            "flux_dev",
            16 * 128 * 128,
            ("backend.dtype=float32",),
            "estimate of memory at 32 bits: 75 GB = weights 47.6 GB",
        ),
    ],
)
def test_memory_of_the_real_families(tmp_path, name, elements, more, memory):
    """As README, "Distillation", has it."""
    (tmp_path / "prompts.txt").write_text("a\nb\nc")
    settings = [f"bank.prompts={tmp_path / 'prompts.txt'}", *more]
    config = load_config(DistillConfig, DISTILL.configs / f"{name}.yaml", settings)
    spec = config.spec()
    assert estimates.latent_elements(spec) == elements
    out = distill.plan(config, None)
    assert memory in out
    pairs, kept = config.bank.pairs + config.bank.heldout_pairs, config.nodes.num_steps - 1
    assert numbers(out, "bank on disk:") == pytest.approx([2 * pairs * kept * elements / 1e9], rel=0.01)
    assert check_backend(spec)[0].size is not None
