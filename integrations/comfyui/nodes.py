"""The node EPDSampler, for ComfyUI's V3 schema; its tables are JSON files in models/epd_tables."""

import os

import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from .sample_epd import LearnedTable
from .sampling import sample

KIND = "epd_tables"
folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))
folder_paths.folder_names_and_paths[KIND] = (folder_paths.folder_names_and_paths[KIND][0], {".json"})


class EPDSampler(io.ComfyNode):
    """A learned table as a SAMPLER and the SIGMAS it was made for, which belong together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs of the node."""
        hint = "Evaluate all points of a level in one batch where that is possible; else one after another."
        return io.Schema(
            node_id="EPDSampler",
            display_name="EPD learned sampler",
            category="sampling/custom_sampling/samplers",
            description="A sampler learned for one model, guidance scale and number of steps.",
            inputs=[
                io.Combo.Input("table", options=folder_paths.get_filename_list(KIND)),
                io.Boolean.Input("parallel_points", default=True, tooltip=hint),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, table: str, parallel_points: bool) -> float:
        """Changes when the file of a table does."""
        return os.path.getmtime(folder_paths.get_full_path_or_raise(KIND, table))

    @classmethod
    def execute(cls, table: str, parallel_points: bool) -> io.NodeOutput:
        """The sampler, and its noise levels with 0 at the end, where ComfyUI does not rescale latents."""
        learned = LearnedTable.from_json(folder_paths.get_full_path_or_raise(KIND, table))
        sampler = comfy.samplers.KSAMPLER(sample, {"table": learned, "parallel_points": parallel_points})
        return io.NodeOutput(sampler, torch.FloatTensor([*learned.nodes[:-1], 0.0]))


class EPDExtension(ComfyExtension):
    """The nodes of this folder."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """What ComfyUI registers."""
        return [EPDSampler]


async def comfy_entrypoint() -> EPDExtension:
    """Where ComfyUI looks for the nodes."""
    return EPDExtension()
