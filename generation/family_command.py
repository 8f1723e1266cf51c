"""The command line of one family, made from sample.py's: what sample_sd3.py and sample_flux.py are."""

from dataclasses import replace
from pathlib import Path

import click

from backends import check_backbone_known
from backends.prompts import parse_seeds
from generation import Output
from sample import Choice, produce
from sample_options import BATCH_HELP, SEEDS_HELP, EitherSpelling, sampling_options
from solvers import UserError, load_predictor, resolve_predictor_path


def family_command(family: str, title: str, seeds: str, batch_size: int, outdir: str, exps: dict[int, str], check=None) -> click.Command:
    """The command line of one family: sample.py's, with the family's defaults and fewer options.

    `exps` holds the default predictor of each resolution, the first one the default; `check` says what is missing.
    """

    @click.command(cls=EitherSpelling, help=title)
    @click.option("--predictor", "--predictor-path", help=f"Learned table; by default {' or '.join(exps.values())}.")
    @click.option("--model-path", "--model-id", help="Folder or hub id of the backbone.")
    @click.option("--resolution", type=click.IntRange(1), help="Pixels a side; the predictor's by default.")
    @click.option("--seeds", default=seeds, show_default=True, help=SEEDS_HELP)
    @click.option("--batch", "--max-batch-size", type=click.IntRange(1), default=batch_size, show_default=True, help=BATCH_HELP)
    @sampling_options
    @click.option("--outdir", type=click.Path(path_type=Path), default=Path(outdir), show_default=True)
    def command(
        predictor,
        model_path,
        resolution,
        backend_config,
        seeds,
        prompt,
        prompt_file,
        batch,
        device,
        outdir,
        grid,
        only_check=False,
        **rest,
    ):
        if only_check:
            check(model_path)
            return
        if predictor is None and (rest["solver"] == "epd" or rest["steps_match"]):
            predictor = exps.get(resolution, next(iter(exps.values())))
        config = (backend_config or {}) | ({} if resolution is None else {"resolution": resolution})
        choice = Choice(predictor, backend_config=config, model_path=model_path, **rest)
        if predictor is None:
            choice = replace(choice, backend=family)
        else:
            path = resolve_predictor_path(predictor)
            spec = load_predictor(path).spec
            check_backbone_known(spec, path)
            made_for = spec.backend_config.get("family", "ldm") if spec.backend == "digits" else spec.backend
            if made_for != family:
                raise UserError(f"--predictor {predictor} was made for {made_for}, but this command is for {family}; use sample.py")
        produce(choice, parse_seeds(seeds), (prompt, prompt_file), device, Output(outdir, batch, grid=grid, pair_by_position=True))

    if check is None:
        return command
    help_text = "Say what is missing to run the real model, and do nothing else."
    return click.option("--check", "only_check", is_flag=True, help=help_text)(command)
