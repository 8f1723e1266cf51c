"""Export a policy's mean table as a predictor: python -m training.ppo.export_epd_predictor RUN_DIR."""

import json
from pathlib import Path

import click

from common.distributed import check_device
from common.errors import run_command
from common.files import write_atomically
from solvers import UserError, save_predictor

from ..config import load_config
from ..launch import check_float64
from ..run_folder import RunFolder
from .config import RDPOConfig
from .policies import policy_of
from .setup import find_start, predictor_of


@click.command()
@click.argument("run_dir")
@click.option(
    "--checkpoint",
    help="A checkpoint of the run, by path or name; by default the best policy by held-out reward.",
)
@click.option(
    "--output-dir", type=click.Path(path_type=Path), help="Where to write; RUN_DIR/export by default."
)
@click.option("--device", help="Where the policy is evaluated, for its float64 arithmetic; cpu by default.")
@click.option("--no-manifest", is_flag=True, help="Leave out the JSON file beside the predictor.")
def main(
    run_dir: str, checkpoint: str | None, output_dir: Path | None, device: str | None, no_manifest: bool
) -> None:
    """Write the table that sampling uses: mean positions and weights, median scales, and the solver that was
    rolled out.
    """
    run = RunFolder.find(run_dir, kind="ppo", option="RUN_DIR")
    path = None
    if checkpoint is not None:
        places = [Path(checkpoint), run.path / checkpoint, run.checkpoints / checkpoint]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            held = ", ".join(p.name for p in sorted(run.checkpoints.glob("*.pt")))
            raise UserError(f"--checkpoint {checkpoint}: no such file; {run.checkpoints} holds {held}")
    state = run.load_checkpoint(path)
    if not {"policy", "best", "export"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of an RDPO run")
    check_device(device or "cpu")
    check_float64(device)
    config = load_config(RDPOConfig, run.config)
    policy = policy_of(config, find_start(config), state["export"]["nodes"]).to(device or "cpu")
    if path is None:
        best = state["best"]
        step, learned, measured = best["step"], best["state"], {"heldout_gain": best["gain"]}
    else:
        step, learned, measured = state["step"], state["policy"], {}
    predictor = predictor_of(policy, learned, state["export"], {"step": step, **measured})
    folder = output_dir or run.export
    target = folder / f"network-snapshot-export-step{step:06d}.pkl"
    save_predictor(predictor, target)
    if not no_manifest:
        metrics = [r for r in run.records() if r["step"] == step]
        manifest = {
            "run_dir": str(run.path),
            "checkpoint": "best" if path is None else path.name,
            "step": step,
            "metrics": metrics,
        }
        write_atomically(
            folder / f"export-manifest-step{step:06d}.json", (json.dumps(manifest, indent=1) + "\n").encode()
        )
    click.echo(f"wrote {target}")


if __name__ == "__main__":
    run_command(main)
