"""Which solver comes nearest to the exact trajectory at a serial depth: python -m benchmarks.compare_solvers."""

import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from backends import Backend, load_backend
from backends.digits.data import ALL_LABELS, HELD_OUT_LABELS, evaluation_prompts, parse
from backends.digits.judge import Judge
from backends.distributed import Ranks, process_group
from generation import Sampler, make_grid
from solvers import BASELINES, DPM2, EPD, SolverTable, Spec, UserError, load_predictor, num_steps_for_depth
from solvers.errors import run_command
from training.config import load_config, to_yaml
from training.distill.bank import rmse_per_image
from training.distill.config import DistillConfig
from training.distill.launch import distill
from training.run_folder import RunFolder

from .report import mean_and_halfwidth, text_table, write_json

TEACHER_INTERVALS = 64
FIRST_SEED = 100_000
TUNING_SEED = 200_000
TUNING_IMAGES = 48
POINTS = 2
COLUMNS = 16
ROOT = Path(__file__).parents[1]
DISTILLED = ROOT / "exps" / "digits-distilled"
SHORT = [
    "bank.pairs=256",
    "bank.heldout_pairs=64",
    "train.steps=60",
    "evaluation.interval=30",
    "evaluation.depths=[]",
    "evaluation.tuning_pairs=32",
    "evaluation.baselines=[euler,ipndm2,dpmpp,unipc]",
]
SOLVERS = [*BASELINES, "epd-start", "epd-plugin-start"]
SCHEDULES = ["discrete", "polynomial", "logsnr", "time_uniform"]


def solver_of(name: str, depth: int):
    """A solver of serial depth `depth` and its number of nodes; the start tables of EPD have equally spaced points."""
    if name in BASELINES:
        return BASELINES[name], num_steps_for_depth(BASELINES[name], depth)
    if depth % 2 or depth < 2:
        raise UserError(f"{name} has no serial depth {depth}; the nearest are {depth - 1} and {depth + 1}")
    return EPD(SolverTable.uniform(depth // 2, POINTS), max_order=2 if name == "epd-plugin-start" else 1), depth // 2 + 1


def run(sampler: Sampler, prompts: list[str], seeds: list[int], batch: int) -> tuple[Tensor, Tensor, float]:
    """Latents, images and seconds per image (text encoding and decoding included) of all prompts."""
    begin, latents, images = time.perf_counter(), [], []
    for i in range(0, len(prompts), batch):
        latents.append(sampler.latents(prompts[i : i + batch], seeds[i : i + batch]))
        with torch.inference_mode():
            images.append(sampler.backend.decode(latents[-1]).cpu())
    return torch.cat(latents).cpu(), torch.cat(images), (time.perf_counter() - begin) / len(prompts)


def has_depth(name: str, depth: int) -> bool:
    """Whether a solver has this serial depth."""
    try:
        return bool(solver_of(name, depth))
    except UserError:
        return False


def teacher_sampler(backend: Backend, guidance: float, intervals: int, schedule: str = "polynomial") -> Sampler:
    """DPM-Solver-2 on many intervals between the same first and last node; these nodes bring it nearest to the exact solution."""
    nodes = backend.sigmas(Spec(num_steps=intervals + 1, schedule_type=schedule))
    return Sampler(backend, DPM2(), f"teacher: dpm2, {intervals} intervals", nodes, guidance)


def judged(sampler: Sampler, outcome, teacher: Tensor, judge: Judge, labels: list) -> dict:
    """One row of the comparison."""
    latents, images, seconds = outcome
    verdict = judge(images, labels)
    rmse, rmse_half = mean_and_halfwidth(rmse_per_image(latents, teacher))
    digit, digit_half = mean_and_halfwidth(verdict.digit)
    both, both_half = mean_and_halfwidth(verdict.digit_and_colour)
    return {
        "solver": sampler.solver_name,
        "depth": sampler.cost.depth,
        "evaluations": sampler.cost.evaluations,
        "nodes": len(sampler.sigmas),
        "rmse": rmse,
        "rmse_halfwidth": rmse_half,
        "digit": digit,
        "digit_halfwidth": digit_half,
        "digit_and_colour": both,
        "digit_and_colour_halfwidth": both_half,
        "frechet_percent": judge.frechet(verdict.features),
        "seconds_per_image": seconds,
    }


def cells(row: dict) -> list[str]:
    return [
        row["solver"],
        row["schedule"],
        str(row["depth"]),
        str(row["evaluations"]),
        f"{row['rmse']:.4f} ± {row['rmse_halfwidth']:.4f}",
        f"{100 * row['digit']:.1f} ± {100 * row['digit_halfwidth']:.1f}",
        f"{100 * row['digit_and_colour']:.1f} ± {100 * row['digit_and_colour_halfwidth']:.1f}",
        f"{row['frechet_percent']:.2f}",
        f"{row['seconds_per_image']:.4f}",
    ]


HEADER = ["solver", "schedule", "depth", "evals", "RMSE to teacher", "digit %", "digit+colour %", "Frechet %", "s/image"]


def draw(path: Path, pictures: dict[str, Tensor], rows: list[dict], title: str) -> None:
    """Images of the same prompts and seeds, a row a solver, and the error against serial depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from cycler import cycler

    figure, axes = plt.subplots(len(pictures) + 1, 1, figsize=(10, 0.62 * len(pictures) + 4.6), height_ratios=[1] * len(pictures) + [6])
    figure.suptitle(title, fontsize=10)
    for axis, (name, images) in zip(axes[:-1], pictures.items(), strict=True):
        axis.imshow(make_grid(images, len(images)).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axes[-1].set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * cycler(color=plt.get_cmap("tab10").colors[:5]))
    for name in dict.fromkeys(r["solver"] for r in rows if r["rmse"] > 0):
        line = [r for r in rows if r["solver"] == name]
        depth, error, half = ([r[k] for r in line] for k in ("depth", "rmse", "rmse_halfwidth"))
        axes[-1].errorbar(depth, error, half, marker="o", ms=3, label=name)
    axes[-1].set(yscale="log", xlabel="serial depth (parallel evaluations one after the other)", ylabel="RMSE to the teacher")
    axes[-1].grid(True, which="both", alpha=0.3)
    axes[-1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclass(frozen=True)
class Bench:
    """Prompts and seeds of a comparison and the teacher's latents and images of them."""

    backend: Backend
    guidance: float
    prompts: list[str]
    seeds: list[int]
    batch: int
    teacher: tuple[Tensor, Tensor, float]

    @classmethod
    def make(
        cls,
        backend: Backend,
        guidance: float,
        n: int,
        first_seed: int,
        batch: int,
        intervals: int = TEACHER_INTERVALS,
        keep: Path | None = None,
    ) -> "Bench":
        """Run the teacher, or read from the folder `keep` what it gave before."""
        prompts, seeds = evaluation_prompts(n, ALL_LABELS), list(range(first_seed, first_seed + n))
        path = None if keep is None else keep / f"teacher-{backend.fingerprint()}-{guidance:g}-{intervals}-{first_seed}-{n}-{batch}.pt"
        if path is not None and path.is_file():
            return cls(backend, guidance, prompts, seeds, batch, torch.load(path, weights_only=True))
        teacher = run(teacher_sampler(backend, guidance, intervals), prompts, seeds, batch)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(teacher, path)
        return cls(backend, guidance, prompts, seeds, batch, teacher)

    def run(self, sampler: Sampler) -> tuple[Tensor, Tensor, float]:
        return run(sampler, self.prompts, self.seeds, self.batch)

    def error(self, sampler: Sampler) -> float:
        """Mean RMSE to the teacher."""
        return rmse_per_image(self.run(sampler)[0], self.teacher[0]).mean().item()


def sampler_of(backend: Backend, guidance: float, name: str, depth: int, schedule: str) -> Sampler:
    """A solver of one serial depth on the nodes of one schedule."""
    solver, num_steps = solver_of(name, depth)
    return Sampler(backend, solver, name, backend.sigmas(Spec(num_steps=num_steps, schedule_type=schedule)), guidance)


def shipped(backend: Backend, guidance: float, depth: int) -> dict[str, Sampler]:
    """The distilled predictors that come with the project, for a guidance and serial depth."""
    found = {}
    for kind in ("epd", "tableau1", "tableau2"):
        path = DISTILLED / f"{kind}-g{guidance:g}-d{depth}" / "network-snapshot-export-best.pkl"
        if path.is_file():
            predictor = load_predictor(path)
            found[f"{kind} distilled"] = Sampler(backend, predictor.solver(), f"{kind} distilled", predictor.sigmas, guidance)
    return found


def distilled_now(backend: Backend, guidance: float, depth: int, ranks: Ranks, folder: Path) -> Sampler:
    """A tableau learned here and now from few pairs in few steps: the whole of stage 1 in a minute or two."""
    config = load_config(DistillConfig, ROOT / "training" / "distill" / "cfgs" / "digits_tableau.yaml", SHORT)
    config.guidance_scale, config.student.depth, config.bank.folder = guidance, depth, str(folder / "bank")
    trainer = distill(config, ranks, RunFolder.create(f"demo-d{depth}", to_yaml(config), ranks, folder), None, None)
    predictor = load_predictor(trainer.run.export / "network-snapshot-export-best.pkl")
    return Sampler(backend, predictor.solver(), "tableau2, just now", predictor.sigmas, guidance)


def compare(
    bench: Bench, tuning: Bench, depths: list[int], schedules: list[str], learned: dict[int, dict[str, Sampler]]
) -> tuple[list[dict], dict[int, dict[str, Tensor]]]:
    """Rows of the comparison, each solver on the schedule that suits it best on the tuning seeds, and images by depth and solver."""
    labels, judge = [parse(p) for p in bench.prompts], Judge(device=bench.backend.device)
    teacher = teacher_sampler(bench.backend, bench.guidance, TEACHER_INTERVALS)
    rows = [{"schedule": "polynomial"} | judged(teacher, bench.teacher, bench.teacher[0], judge, labels)]
    pictures = {depth: {"teacher": bench.teacher[1][:COLUMNS]} for depth in depths}
    tasks = [(depth, name) for depth in depths for name in SOLVERS if has_depth(name, depth)]
    for depth, name in tqdm(tasks, desc="solvers", disable=None):
        candidates = {s: sampler_of(bench.backend, bench.guidance, name, depth, s) for s in schedules}
        best = min(candidates, key=lambda s: tuning.error(candidates[s])) if len(schedules) > 1 else schedules[0]
        found = bench.run(candidates[best])
        rows.append({"schedule": best} | judged(candidates[best], found, bench.teacher[0], judge, labels))
        pictures[depth][name] = found[1][:COLUMNS]
    for depth, name in [(d, n) for d in depths for n in learned[d]]:
        found = bench.run(learned[depth][name])
        rows.append({"schedule": "learned"} | judged(learned[depth][name], found, bench.teacher[0], judge, labels))
        pictures[depth][name] = found[1][:COLUMNS]
    order = {name: i for i, name in enumerate(dict.fromkeys(r["solver"] for r in rows))}
    return sorted(rows, key=lambda r: (r["rmse"] > 0, r["depth"], order[r["solver"]])), pictures


def teacher_error(bench: Bench, n: int = 32) -> tuple[float, float]:
    """RMSE between the teacher and one with half as many intervals again, on the first n images: mean and half width."""
    finer = teacher_sampler(bench.backend, bench.guidance, TEACHER_INTERVALS * 3 // 2)
    latents = run(finer, bench.prompts[:n], bench.seeds[:n], bench.batch)[0]
    return mean_and_halfwidth(rmse_per_image(bench.teacher[0][:n], latents))


@click.command()
@click.option("--n", "count", type=click.IntRange(2), default=256, show_default=True, help="Images for each row.")
@click.option("--depths", default="4,6,8,10", show_default=True)
@click.option("--guidance", type=click.FloatRange(0), default=7.5, show_default=True)
@click.option("--schedule", type=click.Choice(["best", *SCHEDULES]), default="best", show_default=True, help="best: chosen on other seeds.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@click.option("--distil/--no-distil", default=True, show_default=True, help="Also learn a tableau here and now, at the middle depth.")
@click.option("--device", help="CUDA where there is one by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
def main(count: int, depths: str, guidance: float, schedule: str, batch: int, distil: bool, device: str | None, out: Path) -> None:
    """Sample digits with every solver from the same prompts and seeds, and hold them against a fine solver and the judge."""
    try:
        depth_list = sorted({int(d) for d in depths.split(",")})
    except ValueError:
        depth_list = []
    if not depth_list or not all(1 <= d <= 1000 for d in depth_list):
        raise UserError(f"--depths {depths!r}: expected numbers from 1 to 1000 such as 4,6,8,10")
    middle = depth_list[(len(depth_list) - 1) // 2]
    out.mkdir(parents=True, exist_ok=True)
    schedules = SCHEDULES if schedule == "best" else [schedule]
    with process_group(device) as ranks:
        backend = load_backend(Spec(backend="digits"), ranks.device)
        tuning = Bench.make(backend, guidance, TUNING_IMAGES if len(schedules) > 1 else 1, TUNING_SEED, batch)
        bench = Bench.make(backend, guidance, count, FIRST_SEED, batch)
        learned = {d: shipped(backend, guidance, d) for d in depth_list}
        if distil:
            learned[middle] |= {"tableau2, just now": distilled_now(backend, guidance, middle, ranks, out)}
        rows, pictures = compare(bench, tuning, depth_list, schedules, learned)
        fineness = teacher_error(bench)
    unseen = sum(parse(p) in HELD_OUT_LABELS for p in bench.prompts)
    choice = f"All solvers have {schedule} nodes"
    if schedule == "best":
        choice = f"Each solver has the schedule with which it comes nearest to the teacher on {TUNING_IMAGES} other seeds"
    network_rows = "1 network row" if guidance == 1 else "2 network rows"
    note = (
        f"{count} prompts and seeds, the same for all rows ({unseen} prompts name combinations never trained on). Guidance {guidance:g}: "
        f"each evaluation is {network_rows}. No node at 0, no finish. {choice}. ± is half a 95 % interval.\n"
        f"The teacher is DPM-Solver-2 with {TEACHER_INTERVALS} intervals; it differs by RMSE {fineness[0]:.4f} "
        f"from {TEACHER_INTERVALS * 3 // 2} intervals."
    )
    table = text_table(HEADER, [cells(r) for r in rows], text_columns=2)
    click.echo(f"\n{note}\n\n{table}\n")
    (out / "solvers.md").write_text(f"{note}\n\n{table}\n", encoding="utf-8")
    settings = {"n": count, "guidance": guidance, "schedule": schedule, "batch": batch, "teacher_error": fineness[0]}
    write_json(out / "solvers.json", settings, rows, backend.device)
    draw(out / "solvers.png", pictures[middle], rows, f"digits, guidance {guidance:g}: the same prompts and seeds at serial depth {middle}")
    click.echo(f"wrote {out / 'solvers.md'}, {out / 'solvers.json'} and the picture {out / 'solvers.png'}")


if __name__ == "__main__":
    run_command(main)
