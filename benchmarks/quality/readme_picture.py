"""Draw docs/assets/epd.png: one step of EPD-Solver, and the same prompts at equal serial depth."""

from collections.abc import Sequence
from pathlib import Path

import click
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from backends import Backend, load_backend
from common.errors import run_command
from generation.generate import Sampler
from generation.output import make_grid
from solvers import BASELINES, DPM2, Spec, load_predictor, num_steps_for_depth, resolve_predictor_path

ROOT = Path(__file__).parents[2]
DEPTH, GUIDANCE = 6, 7.5
PROMPTS = (
    "a thin blue handwritten three",
    "a bold red handwritten seven",
    "a green handwritten eight",
    "a bold black handwritten five",
    "a thin purple handwritten two",
    "an orange handwritten nine",
    "a bold blue handwritten four",
    "a red handwritten six",
)
INK, BLUE, GREY = "#1f2430", "#3556c4", "#8a90a0"


def samplers(backend: Backend) -> dict[str, Sampler]:
    """The rows of the strip, by name."""

    def baseline(name: str, schedule: str) -> Sampler:
        steps = num_steps_for_depth(BASELINES[name], DEPTH)
        nodes = backend.sigmas(Spec(num_steps=steps, schedule_type=schedule))
        return Sampler(backend, BASELINES[name], name, nodes, GUIDANCE)

    def learned(name: str) -> Sampler:
        predictor = load_predictor(resolve_predictor_path(name, exps=ROOT / "exps"))
        assert predictor.sigmas is not None
        return Sampler(backend, predictor.solver(), name, predictor.sigmas, GUIDANCE)

    fine = backend.sigmas(Spec(num_steps=65, schedule_type="polynomial"))
    return {
        "DPM-Solver++": baseline("dpmpp", "discrete"),
        "Euler (DDIM)": baseline("euler", "time_uniform"),
        "EPD, distilled": learned("digits/grid/epd-g7.5-d6"),
        "tableau, distilled": learned("digits/grid/tableau2-g7.5-d6"),
        "teacher": Sampler(backend, DPM2(), "dpm2", fine, GUIDANCE),
    }


def draw_step(axes: Axes) -> None:
    """The points of one step between two nodes, on the trajectory of x over the noise level."""

    def state(s: np.ndarray | float) -> np.ndarray:
        return 0.18 + 0.8 * np.asarray(s) ** 2.2

    grid = np.linspace(0.04, 0.96, 200)
    axes.plot(grid, state(grid), color=GREY, lw=2, zorder=1)
    s, s_next, points = 0.9, 0.1, (0.64, 0.4)
    rate = 0.8 * 2.2 * s**1.2  # dx/ds at the node
    for k, s_k in enumerate(points, 1):
        x_k = float(state(s)) + rate * (s_k - s)
        axes.plot([s, s_k], [state(s), x_k], color=BLUE, lw=1, ls=(0, (4, 3)), zorder=2)
        axes.scatter([s_k], [x_k], s=54, color=BLUE, zorder=3)
        axes.annotate(
            f"$x_{k}$ at $s_{k}$", (s_k, x_k), (-62, -12), textcoords="offset points", color=BLUE, fontsize=10
        )
    axes.annotate(
        "",
        (s_next, float(state(s_next))),
        (s, float(state(s))),
        arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.8},
    )
    axes.scatter([s, s_next], state(np.array([s, s_next])), s=64, color=INK, zorder=4)
    axes.annotate(
        "$x$ at node $s$", (s, float(state(s))), (8, 2), textcoords="offset points", color=INK, fontsize=10
    )
    axes.annotate(
        "$x'$ at node $s'$",
        (s_next, float(state(s_next))),
        (-12, -20),
        textcoords="offset points",
        color=INK,
        fontsize=10,
    )
    axes.text(
        0.42,
        0.98,
        r"$x' = x + (s'-s)\,\sum_k w_k\, o_k\, a_k\,v(x_k,\, a_k s_k)$"
        + "\nK evaluations in one batch;\n$s_k, w, o, a$ are learned",
        transform=axes.transAxes,
        ha="left",
        va="top",
        fontsize=10,
        color=INK,
    )
    axes.set(xlim=(1.0, 0.0), ylim=(-0.22, 0.95), xticks=[], yticks=[])
    axes.set_xlabel("noise level, from noise to image", fontsize=9, color=GREY)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title("One step of EPD-Solver", fontsize=12, color=INK, loc="left")


def draw_strip(axes: Axes, rows: dict[str, tuple[Sampler, Tensor]], prompts: Sequence[str]) -> None:
    """A row of images for each solver."""
    images = torch.cat([images for _, images in rows.values()])
    grid = make_grid(images, columns=len(prompts)).permute(1, 2, 0).numpy()
    axes.imshow(grid, interpolation="nearest")
    height = grid.shape[0] / len(rows)
    for i, (name, (sampler, _)) in enumerate(rows.items()):
        cost = sampler.cost
        label = f"{name}\ndepth {cost.depth}, {cost.evaluations} NFE"
        axes.text(-5, (i + 0.5) * height, label, ha="right", va="center", fontsize=9, color=INK)
    axes.set_axis_off()
    axes.set_title(f"The same prompts and noise at serial depth {DEPTH}", fontsize=12, color=INK, loc="left")


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=ROOT / "docs" / "assets" / "epd.png", show_default=True
)
@click.option("--first-seed", type=click.IntRange(0), default=500_000, show_default=True)
def main(out: Path, first_seed: int) -> None:
    """Sample the strip and write the picture; under a minute on a CPU."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    backend = load_backend(Spec(backend="digits"), "cpu")
    seeds = list(range(first_seed, first_seed + len(PROMPTS)))
    rows = {name: (sampler, sampler.images(PROMPTS, seeds)) for name, sampler in samplers(backend).items()}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 3.5), width_ratios=(1, 1.95), layout="constrained"
    )
    draw_step(left)
    draw_strip(right, rows, PROMPTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100, facecolor="white")
    plt.close(figure)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
