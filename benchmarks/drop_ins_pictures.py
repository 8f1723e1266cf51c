"""The pictures of docs/diffusers.md and docs/comfyui.md: python -m benchmarks.drop_ins_pictures."""

import json
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from solvers import DPM2, polynomial, sample

from .drop_ins_setting import ROOT, Setting, stock_dpmpp

TABLE = "tableau1-g7.5-d6"
WORKFLOW = ROOT / "integrations" / "comfyui" / "example_workflow.json"
COLUMNS = [["1"], ["2", "3", "4", "5"], ["6"], ["7"], ["8"]]


def digits(target: Path) -> None:
    """Rows of digits from the same noise: DPM++, a learned table at equal calls, a fine solution."""
    setting = Setting("ldm", 8)
    predictor, scheduler = setting.scheduler(TABLE)
    calls, guidance, nodes = predictor.cost().evaluations, setting.guidance(predictor), predictor.sigmas
    rows = {
        f"DPM++, {calls} calls": setting.call(stock_dpmpp(setting), calls, guidance),
        f"learned table, {calls} calls": setting.call(scheduler, calls, guidance),
    }
    fine = polynomial(65, nodes[-1].item(), nodes[0].item())
    with torch.inference_mode():
        rows["128 calls of DPM-Solver-2"] = sample(
            DPM2(), setting.velocity(predictor), setting.noise * fine[0].item(), fine
        )
        images = {name: setting.backend.decode(latents) for name, latents in rows.items()}
    figure, axes = plt.subplots(len(images), 1, figsize=(6, 3))
    for axis, (name, pictures) in zip(axes, images.items(), strict=True):
        axis.imshow(torch.cat(list(pictures), 2).permute(1, 2, 0).numpy())
        axis.set_title(name, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(target, dpi=120)


def workflow(target: Path) -> None:
    """The nodes of the example workflow and their links."""
    nodes = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    places = {n: (2.4 * i, -1.0 * j) for i, column in enumerate(COLUMNS) for j, n in enumerate(column)}
    figure, axis = plt.subplots(figsize=(9, 3))
    for number, node in nodes.items():
        x, y = places[number]
        own = node["class_type"] == "EPDSampler"
        style = {"boxstyle": "round", "facecolor": "#ffd27f" if own else "#e6e6e6"}
        axis.text(x, y, node["class_type"], ha="center", va="center", fontsize=7, bbox=style, zorder=2)
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                before = places[value[0]]
                color = "#d08000" if name in ("sampler", "sigmas") else "#999999"
                axis.plot([before[0], x], [before[1], y], color=color, linewidth=1, zorder=1)
    axis.set_xlim(-1, 10.6)
    axis.set_ylim(-3.5, 0.5)
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(target, dpi=120)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=ROOT / "docs", show_default=True, help="Folder."
)
def main(out: Path) -> None:
    """Draw both pictures."""
    torch.set_num_threads(1)
    digits(out / "diffusers.png")
    workflow(out / "comfyui.png")
    click.echo(f"wrote {out / 'diffusers.png'}, {out / 'comfyui.png'}")


if __name__ == "__main__":
    main()
