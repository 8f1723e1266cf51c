"""enable_parallel_points: all points of a level in one call give what one point a call gives."""

import pytest
from parallel_cases import build, scheduler_for, sequential_and_parallel
from reference import CLOSE

KINDS = ["epd", "plugin", "tableau2", "wide2"]


NAMES = [
    "sd",
    "no guidance",
    "v_prediction",
    "guidance_rescale",
    "sdxl",
    "sd3",
    "flux",
    "flux true cfg",
    "controlnet",
    "guess mode",
    "two controlnets",
    "pag",
    "inpainting",
    "inpainting unet",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_kinds_of_table(parts, name, kind, tmp_path):
    case, (scheduler, cost) = build(name, parts), scheduler_for(name, parts, kind, tmp_path)
    calls, network = [], case.pipe.components.get("unet") or case.pipe.transformer
    hook = network.register_forward_pre_hook(lambda m, a, k: calls.append(1), with_kwargs=True)
    plain, parallel = sequential_and_parallel(case, scheduler, cost)
    hook.remove()
    assert (plain - parallel).abs().max() < CLOSE * max(1.0, plain.abs().max())
    assert len(calls) == cost.evaluations + cost.depth
    assert cost.depth < cost.evaluations


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("sd", "sd3", "flux")])
def test_pipelines(parts, name, tmp_path):
    case, (scheduler, cost) = build(name, parts), scheduler_for(name, parts, "wide2", tmp_path)
    plain, parallel = sequential_and_parallel(case, scheduler, cost)
    assert (plain - parallel).abs().max() < CLOSE * max(1.0, plain.abs().max())
