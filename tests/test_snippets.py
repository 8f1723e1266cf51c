"""The Python in README.md and docs/library.md runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch

from solvers import Spec, denoiser_from_velocity

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def names():
    """What the snippets take as given: a denoiser, a pipeline, noise."""
    from diffusers import StableDiffusionPipeline

    from backends import load_backend

    backend = load_backend(Spec(backend="digits"), "cpu")
    velocity = backend.velocity(backend.encode(["a red handwritten three"], 1.0))
    pipe = StableDiffusionPipeline.from_pretrained("digits/sd", dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    denoiser = denoiser_from_velocity(lambda x, s: velocity(x, s.double().cpu()))
    return {"denoiser": lambda x, sigma: denoiser(x, sigma[0].double().cpu()), "pipe": pipe}


def test_the_readme(names, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, second, _ = blocks("README.md")  # the third: tests/training/distill/test_own_model.py
    scope = dict(names)
    scope["denoiser"] = lambda x, sigma: 0.5 * x
    exec(first, scope)
    assert scope["x"].shape == (4, 4, 8, 8)
    assert scope["x"].isfinite().all()
    assert scope["predictor"].cost().depth == 4
    exec(second, scope)
    assert scope["image"].size == (32, 32)


def test_the_library_page(names, monkeypatch):
    monkeypatch.chdir(ROOT)
    scope = dict(names) | {"denoiser": lambda x, sigma: 0.5 * x, "x": torch.randn(2, 4, 8, 8)}
    for block in blocks("docs/library.md"):
        if "cifar10" in block:  # a file of the published system
            continue
        code = block.replace('"cuda"', '"cpu"').replace("exps/sd15/start.pkl", "exps/digits/start.pkl")
        exec(code.replace('"exps/sd15"', '"exps/digits"'), scope)
    assert scope["images"].shape == (1, 3, 32, 32)
    assert scope["tableau"].depth == 10
