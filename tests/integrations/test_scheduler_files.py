"""Saving and loading EPDScheduler: exact numbers, validation, pipelines, predictors without nodes."""

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from cases import Case, noise_scheduler, sd_parts
from diffusers import StableDiffusionPipeline
from reference import EXPS, random_table, table_file
from scheduler_cases import BROKEN, KINDS, noise_nodes

from integrations.diffusers import EPDScheduler
from solvers import compile_tableau, discrete, flowmatch, load_predictor, save_predictor
from solvers.schedules import NoiseSchedule

CONFIG = noise_scheduler().config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    counts = {"epd": 3, "plugin": 4, "tableau1": 4, "tableau2": 5, "wide2": 6}  # 6, 9, 3, 12, 20 calls
    return {kind: random_table(kind, noise_nodes(CONFIG, n), folder, "ldm") for kind, n in counts.items()}


@pytest.fixture(scope="module")
def saved(files, tmp_path_factory):
    """A scheduler with all kinds of table, and its folder."""
    scheduler, folder = (
        EPDScheduler.from_predictor(*files.values(), config=CONFIG),
        tmp_path_factory.mktemp("saved"),
    )
    scheduler.save_pretrained(folder)
    return scheduler, folder


def test_json_keeps_every_number(saved, files):
    scheduler, folder = saved
    loaded = EPDScheduler.from_pretrained(folder)
    assert loaded.config.tables == scheduler.config.tables
    assert {int(n) for n in loaded.config.tables} == {6, 9, 3, 12, 20}
    for kind in KINDS:
        predictor = load_predictor(files[kind])
        tableau = compile_tableau(predictor.solver(), predictor.sigmas)
        table = loaded.config.tables[str(tableau.evaluations)]
        for name in ("sigmas", "stages", "output"):
            assert torch.equal(torch.tensor(table[name], dtype=torch.float64), getattr(tableau, name))
        assert table["levels"] == [list(level) for level in tableau.levels]


def test_a_table_takes_few_kilobytes(tmp_path):
    EPDScheduler.from_predictor(table_file("epd-g7.5-d4"), config=CONFIG).save_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").stat().st_size < 5000


def test_a_pipeline_with_it_is_saved_and_loaded(saved, tmp_path):
    scheduler, _ = saved
    case = Case(StableDiffusionPipeline(**sd_parts(tmp_path / "words")), (4, 8, 8), {"prompt": "a cat"})
    expected = case.latents(scheduler, 6, case.noise())
    case.pipe.save_pretrained(tmp_path / "pipeline")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(loaded.scheduler, EPDScheduler)
    again = Case(loaded, case.shape, case.options)
    assert torch.equal(again.latents(loaded.scheduler, 6, case.noise()), expected)


def test_push_to_hub_saves_and_uploads(saved, monkeypatch):
    """As of any scheduler; the hub itself is replaced by a list of what would go there."""
    uploads = []

    class Hub:
        repo_id = "someone/epd"

        def __init__(self, *args, **kwargs):
            pass

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *a, **k: Hub())
    monkeypatch.setattr(
        EPDScheduler,
        "_upload_folder",
        lambda self, folder, *a, **k: uploads.extend(os.listdir(folder)),
    )
    saved[0].push_to_hub("someone/epd")
    assert "scheduler_config.json" in uploads


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_one_clear_error(saved, name, tmp_path):
    damage, message = BROKEN[name]
    config = json.loads((saved[1] / "scheduler_config.json").read_text())
    config["tables"]["6"] = damage(copy.deepcopy(config["tables"]["6"]))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        EPDScheduler.from_pretrained(tmp_path)
    text = str(caught.value)
    assert text.startswith("EPDScheduler: tables['6']")
    assert len(text) < 600
    assert "\n" not in text


SETTINGS = {
    "tables": ([1, 2], r"tables is \[1, 2\], expected a dict"),
    "num_train_timesteps": (10**12, "num_train_timesteps is 1000000000000, expected an int from 2 to 100000"),
    "beta_start": ("0.1", "beta_start, beta_end is .*expected 2 finite numbers"),
    "beta_end": (2.0, "beta_start, beta_end is .*expected numbers between 0 and 1"),
    "beta_schedule": (
        "cosine",
        "beta_schedule is 'cosine', expected linear, scaled_linear or squaredcos_cap_v2",
    ),
    "trained_betas": ([0.1], "trained_betas is .*expected 1000 finite numbers"),
    "prediction_type": ("x0", "prediction_type is 'x0', expected one of epsilon"),
    "mu": ("large", "mu is 'large', expected a number or null"),
    "made_for": (["sd"], "made_for is .*expected a dict or null"),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_a_broken_setting_is_one_clear_error(saved, key, tmp_path):
    value, message = SETTINGS[key]
    config = json.loads((saved[1] / "scheduler_config.json").read_text()) | {key: value}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        EPDScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_schedules_are_those_of_diffusers(schedule):
    stock = noise_scheduler(beta_schedule=schedule)
    own = EPDScheduler(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012)
    assert torch.equal(own.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize("name", ["sd15", "sd3-512", "flux"])
def test_predictors_without_nodes_take_those_of_their_schedule(name, tmp_path):
    """As published ones are: the config gives the noise schedule, the predictor or the config the shift."""
    predictor, path = load_predictor(next(EXPS.rglob(f"{name}/start.pkl"))), tmp_path / "published.pkl"
    save_predictor(replace(predictor, sigmas=None), path)
    config = CONFIG if name == "sd15" else {"shift": 3.0, "use_dynamic_shifting": name == "flux"}
    scheduler = EPDScheduler.from_predictor(path, config=config)
    count = predictor.table.num_intervals + 1
    expected = {
        "sd15": lambda: discrete(count, NoiseSchedule(noise_scheduler().alphas_cumprod)),
        "sd3-512": lambda: flowmatch(count, shift=3.0),
        "flux": lambda: flowmatch(count, mu=1.15),
    }[name]()
    (table,) = scheduler.config.tables.values()
    assert table["nodes"] == expected.tolist()
    assert scheduler.config.mu == (pytest.approx(1.15, abs=1e-9) if name == "flux" else None)
