"""Compiled blocks: the same latents and gradients, once for each shape, and one line where it cannot be done.

Most tests trace and lower as inductor does but generate no code (aot_eager), which would take minutes.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from tiny import PROMPTS, load_tiny
from torch.utils._pytree import tree_leaves

from backends import BackendError, compiled, load_backend
from backends.compiled import compilations
from generation.generate import Sampler
from solvers import BASELINES, EPD, SolverTable, Spec, load_predictor, resolve_predictor_path
from training.distill.losses import checkpointed, rollout

ROOT = Path(__file__).parents[2]
TABLES = {
    "ldm": "digits-distilled/epd-g7.5-d4",
    "sd3": "digits-sd3-distilled/epd-g4.5-d4",
    "flux": "digits-flux-distilled/epd-g3.5-d4",
}
CAPTIONS = ["a bold red handwritten seven", "a thin blue handwritten three"]
BLOCKS = {
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
}
COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh():
    """No test sees what another one compiled."""
    torch._dynamo.reset()


@pytest.fixture
def uncoded(monkeypatch):
    """Graphs are compiled as always, but run by torch's own kernels."""
    monkeypatch.setattr(compiled, "TORCH", compiled.TORCH | {"backend": "aot_eager"})


def predictor_of(family):
    return load_predictor(resolve_predictor_path(str(ROOT / "exps" / TABLES[family])))


def backend_of(family, **options):
    spec = predictor_of(family).spec
    return load_backend(replace(spec, backend_config=spec.backend_config | options), "cpu")


def sampler_of(family, **options):
    """Two Euler steps on the nodes of the family's table."""
    predictor = predictor_of(family)
    nodes = predictor.sigmas[:3]
    return Sampler(
        backend_of(family, **options), BASELINES["euler"], "euler", nodes, predictor.spec.guidance_rate
    )


def block_calls(backend) -> set:
    """What distinguishes the calls of blocks: the block's layout, shapes and strides of its inputs."""
    seen: set = set()

    def note(block, args, kwargs):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        seen.add(
            (
                type(block).__name__,
                len(list(block.modules())),
                *[(tuple(t.shape), t.stride()) for t in tensors],
            )
        )

    for block in [m for m in next(iter(backend.networks().values())).modules() if type(m).__name__ in BLOCKS]:
        block.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", TABLES)
def test_one_compilation_for_each_block_and_shape(family, uncoded):
    """Two equal batches and a smaller one: nothing is compiled twice, and nothing stays eager."""
    eager, fast = sampler_of(family), sampler_of(family, compile=True)
    kinds, before, counts = block_calls(eager.backend), compilations(), []
    for seeds in ([0, 1], [2, 3], [6]):
        expected = eager.latents(CAPTIONS[: len(seeds)], seeds)
        assert (fast.latents(CAPTIONS[: len(seeds)], seeds) - expected).abs().max() < 1e-5
        assert compilations() - before == len(kinds)
        counts.append(len(kinds))
    assert 1 <= counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize(
    "family",
    ["ldm", pytest.param("sd3", marks=pytest.mark.slow), pytest.param("flux", marks=pytest.mark.slow)],
)
def test_gradients_of_a_table_are_those_of_the_eager_network(family, uncoded):
    """With the network's calls or its blocks computed again as well, by the same compiled code."""
    eager, fast = backend_of(family), backend_of(family, compile=True)
    expected = gradient(eager, family)
    assert expected.abs().max() > 1e-3
    counts = []
    for again in (
        lambda velocity: velocity,
        checkpointed,
        lambda velocity: fast.checkpoint_blocks() or velocity,
    ):
        torch.testing.assert_close(
            gradient(fast, family, again), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )
        counts.append(compilations())
    assert counts[0] == counts[1] == counts[2]


def gradient(backend, family, again=lambda velocity: velocity) -> torch.Tensor:
    """The gradient of the norm of the state after two steps in the positions and weights of their table."""
    predictor = predictor_of(family)
    nodes = predictor.sigmas[:3]
    leaves = [rows[:2].clone().requires_grad_() for rows in (predictor.table.r, predictor.table.w)]
    velocity = again(backend.velocity(backend.encode(CAPTIONS[:1], predictor.spec.guidance_rate)))
    states = rollout(
        EPD(SolverTable(*leaves)),
        nodes,
        velocity,
        backend.initial_latents([0], nodes[0]),
        False,
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(states[-1].square().mean().sqrt(), leaves)])


def test_more_shapes_than_torch_allows(tiny_folder, uncoded):
    """torch's own limit for a block's code, lowered here, would refuse the third shape or run it eagerly."""
    limits = {"recompile_limit": 1, "accumulated_recompile_limit": 1}
    with torch._dynamo.config.patch(limits), torch.inference_mode():
        backend, before = load_tiny(tiny_folder, compile=True), compilations()
        for rows in range(1, 4):
            backend.velocity(backend.encode(PROMPTS[:1] * rows, 1))(
                backend.initial_latents(range(rows), 1.0), torch.tensor(1.0)
            )
        assert compilations() - before >= 3
        assert torch._dynamo.config.recompile_limit == compiled.LIMIT > 100


@COMPILER
def test_code_is_generated_and_right(tiny_folder):
    nodes = torch.tensor([5.0, 2.0], dtype=torch.float64)
    before, latents = compilations(), []
    for options in ({}, {"compile": True}):
        backend = load_tiny(tiny_folder, **options)
        latents.append(Sampler(backend, BASELINES["euler"], "euler", nodes, 4.0).latents(PROMPTS[:2], [0, 1]))
    assert compilations() - before >= 1
    assert not torch.equal(*latents)
    assert (latents[1] - latents[0]).abs().max() < 1e-3


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("family", TABLES)
def test_latents_of_generated_code(family):
    eager, fast = (
        sampler_of(family, **options).latents(CAPTIONS, [0, 1]) for options in ({}, {"compile": True})
    )
    print(f"{family}: largest difference of latents {(fast - eager).abs().max():.1e}")
    assert (fast - eager).abs().max() < 1e-3


def test_without_a_compiler_it_is_one_line(tiny_folder):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        sampler = Sampler(
            load_tiny(tiny_folder, compile=True), BASELINES["euler"], "euler", torch.tensor([5.0, 2.0]), 4.0
        )
        with pytest.raises(BackendError) as caught:
            sampler.latents(PROMPTS[:1], [0])
    line = str(caught.value)
    assert line.startswith(
        "compile: the network's blocks cannot be compiled on this machine (InvalidCxxCompiler: No working C++"
        " compiler"
    )
    assert line.endswith("leave compile out")
    assert "\n" not in line


def test_compile_is_no_option_of_the_exact_backbone_and_none_of_images(digits):
    with pytest.raises(BackendError, match="no options"):
        load_backend(Spec(backend="gaussian", backend_config={"compile": True}), "cpu")
    options = backend_of("ldm", compile=True, offload=True).image_options()
    assert options == digits.image_options()
