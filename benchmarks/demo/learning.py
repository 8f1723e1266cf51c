"""Parts 2 and 3: a table distilled now, and one tuned on a reward now, beside the shipped ones."""

from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from common.statistics import Estimate, estimate
from generation.generate import Sampler
from rewards import load_reward
from training.config import load_config, to_yaml
from training.distill.config import DistillConfig
from training.distill.launch import distill
from training.launch import ActiveRun
from training.ppo.checks import check
from training.ppo.config import RDPOConfig
from training.ppo.launch import train
from training.ppo.setup import choose_exploration, find_start
from training.run_folder import RunFolder

from ..quality.teacher_reference import EXPS, PromptSeeds, sample_all
from ..report import text_table
from .setting import DEPTH, GUIDANCE, Measured, Setting, announce, error_table

CFGS = Path(__file__).parents[2] / "training"
PAIRS, HELD_OUT, STEPS = 160, 48, 60
DISTILL = [
    f"guidance_scale={GUIDANCE}",
    f"student.depth={DEPTH}",
    "student.num_points=1",
    "student.moment_damping=0.1",
    "train.lr=0.1",
    "teacher.check=0",
    "evaluation.depths=[]",
    "evaluation.tuning_pairs=32",
    "evaluation.baselines=[euler,dpmpp]",
]
RDPO: list[str] = []  # more overrides
RDPO_STEPS, RDPO_IMAGES, UNSEEN, UNSEEN_SEED = 20, 128, 512, 700_000
BEST = "network-snapshot-export-best.pkl"


def distil_now(setting: Setting, measured: list[Measured]) -> None:
    """Distil a tableau with one evaluation a level, and hold it against the shipped one of that kind.

    Args:
        setting: of the demo.
        measured: what part 1 measured, the best first.
    """
    announce(2, f"distil such a table now: {PAIRS} teacher trajectories, {STEPS} steps")
    sizes = [
        f"bank.pairs={PAIRS}",
        f"bank.heldout_pairs={HELD_OUT}",
        f"bank.folder={setting.out / 'bank'}",
        f"train.steps={STEPS}",
        f"evaluation.interval={STEPS // 2}",
    ]
    config = load_config(DistillConfig, CFGS / "distill/cfgs/digits_tableau.yaml", [*DISTILL, *sizes])
    run = RunFolder.create("distilled-now", to_yaml(config), setting.ranks, setting.out)
    distill(config, None, ActiveRun(run, setting.ranks), setting.backend)
    now = setting.measure(setting.learned(run.export / BEST, "tableau K=1, distilled now"))
    shipped = next(m for m in measured if m.name == "tableau K=1, shipped")
    baseline = next(m for m in measured if "shipped" not in m.name and m.nfe == DEPTH)
    click.echo(
        f"{error_table([now, shipped, baseline])}\n"
        f"{now.error / shipped.error:.2f} times the error of the shipped table, made from 1024 trajectories"
        f" in 200 steps, and\n{now.error / baseline.error:.2f} times that of {baseline.name} at the same"
        " depth and NFE."
    )


def tune_now(setting: Setting) -> None:
    """Tune the shipped distilled table of depth 4 on the digits reward for a few steps, and hold its gain on
    unseen prompts and seeds against that of the shipped tuned table.
    """
    announce(3, f"tune a table of depth 4 on a reward (RDPO): {RDPO_STEPS} steps now, 80 for the shipped one")
    distilled = EXPS / "digits/distilled.pkl"
    overrides = [
        f"data.predictor_snapshot={distilled}",
        f"ppo.steps={RDPO_STEPS}",
        f"evaluation.interval={RDPO_STEPS // 2}",
        f"evaluation.images={RDPO_IMAGES}",
        "evaluation.rewards=[]",
        *RDPO,
    ]
    config = load_config(RDPOConfig, CFGS / "ppo/cfgs/digits.yaml", overrides)
    check(config)
    start = find_start(config)
    choose_exploration(config.ppo, start.predictor.is_start)
    run = RunFolder.create("tuned-now", to_yaml(config), setting.ranks, setting.out)
    train(config, start, ActiveRun(run, setting.ranks))
    paths = {
        "EPD, distilled": distilled,
        f"EPD, tuned now ({RDPO_STEPS} steps)": run.export / BEST,
        "EPD, shipped tuned (80 steps)": EXPS / "digits/best.pkl",
    }
    click.echo(gain_table(setting, {name: setting.learned(path, name) for name, path in paths.items()}))


def gain_table(setting: Setting, samplers: dict[str, Sampler]) -> str:
    """Rewards on unseen prompts and seeds, and their paired gains over the first solver, with what they show
    in words.
    """
    pairs = PromptSeeds.evaluation(UNSEEN, UNSEEN_SEED)
    shown = tqdm(samplers.items(), desc="gains", disable=None)
    rewards = {name: rewards_of(setting, sampler, pairs) for name, sampler in shown}
    first = next(iter(rewards.values()))
    rows, sentences = [], []
    for name, values in rewards.items():
        gain = estimate((values - first).tolist(), pairs.prompts)
        rows.append([name, f"{values.mean():.4f}", "–" if values is first else with_interval(gain)])
        if values is not first:
            sentences.append(f"{name}: {outcome(gain)}.")
    table = text_table(["solver (depth 4, 6 NFE)", "reward", "gain over distilled [95 %]"], rows)
    return "\n".join([f"On {UNSEEN} prompts and seeds that no run has seen:\n{table}", *sentences])


def rewards_of(setting: Setting, sampler: Sampler, pairs: PromptSeeds) -> Tensor:
    """The digits reward of each image of a solver, in float64."""
    reward, images = load_reward("digits", {}, setting.backend.device), sample_all(sampler, pairs)[1]
    parts = range(0, len(images), pairs.batch)
    values = [reward(images[i : i + pairs.batch], pairs.prompts[i : i + pairs.batch]) for i in parts]
    return torch.cat(values).double()


def with_interval(gain: Estimate) -> str:
    """A gain with its interval."""
    if gain.interval is None:
        return f"{gain.mean:+.4f}"
    return f"{gain.mean:+.4f} [{gain.interval[0]:+.4f}, {gain.interval[1]:+.4f}]"


def outcome(gain: Estimate) -> str:
    """What an interval shows, in words."""
    if gain.interval is None or gain.interval[0] <= 0 <= gain.interval[1]:
        return "no gain that these images could show"
    return "a gain beyond chance" if gain.mean > 0 else "a loss beyond chance"
