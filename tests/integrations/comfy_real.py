"""Run within a ComfyUI folder: the installed node's sampler in the real KSAMPLER, both ways."""

import sys

sys.path.insert(0, ".")
sys.argv, arguments = [sys.argv[0], "--cpu"], sys.argv[1:]

import asyncio  # noqa: E402
import importlib.util  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.samplers  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow  # noqa: E402

folder, table = map(Path, arguments)
folder_paths.models_dir = str(table.parents[1])
spec = importlib.util.spec_from_file_location(
    "epd", folder / "__init__.py", submodule_search_locations=[str(folder)]
)
module = importlib.util.module_from_spec(spec)
sys.modules["epd"] = module
spec.loader.exec_module(module)
(node,) = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())


class Guider:
    """The exact denoiser of a unit normal distribution in the place of a guider."""

    class inner_model:
        model_sampling = type("Flow", (ModelSamplingDiscreteFlow, CONST), {})()

    conds = {"positive": []}

    def __call__(self, x, sigma, **options):
        size = sigma.view(-1, *[1] * (x.ndim - 1))
        return x * (1 - size) / ((1 - size) ** 2 + size**2)


results = []
for parallel in (True, False):
    sampler, sigmas = node.execute(table.name, parallel).result
    assert isinstance(sampler, comfy.samplers.KSAMPLER)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results.append(
        sampler.sample(
            Guider(), sigmas, {"model_options": {}, "seed": 0}, None, noise, torch.zeros_like(noise)
        )
    )
assert torch.allclose(*results, atol=1e-5), (results[0] - results[1]).abs().max()
print("ok")
