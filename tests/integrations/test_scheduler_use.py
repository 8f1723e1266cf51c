"""How EPDScheduler is used: numbers of steps, callbacks, interruption, copies, number types, refusals."""

import copy
import pickle

import pytest
import torch
from cases import Case, noise_scheduler, sd_parts, sdxl_parts
from diffusers import (
    AutoPipelineForImage2Image,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from reference import CLOSE, capture_warnings, own_latents, random_table, table_file, velocity_of
from scheduler_cases import PROMPTS, digits_case, noise_nodes
from tiny_flow import save_flux

from integrations.diffusers import EPDScheduler
from solvers import EPD, Predictor, SolverTable, Spec, flowmatch, load_predictor, save_predictor

CONFIG = noise_scheduler().config


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    parts = sd_parts(tmp_path_factory.mktemp("sd"))
    return Case(StableDiffusionPipeline(**parts), (4, 8, 8), {"prompt": "a cat", "guidance_scale": 4.0})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tables of 6, 9 and 3 network calls."""
    folder = tmp_path_factory.mktemp("tables")
    kinds = {"epd": 3, "plugin": 4, "tableau1": 4}
    return {
        kind: random_table(kind, noise_nodes(CONFIG, count), folder, "ldm") for kind, count in kinds.items()
    }


def scheduler_of(*paths) -> EPDScheduler:
    return EPDScheduler.from_predictor(*paths, config=CONFIG)


def test_one_scheduler_holds_several_numbers_of_steps(case, files):
    scheduler = scheduler_of(*files.values())
    for path in (files["plugin"], files["epd"], files["tableau1"], files["epd"]):
        predictor = load_predictor(path)
        actual = case.latents(scheduler, predictor.cost().evaluations, case.noise())
        expected = own_latents(predictor, velocity_of(case, CONFIG), case.noise())
        assert (actual - expected).abs().max() < CLOSE * max(1.0, expected.abs().max())


def test_another_number_of_steps_names_those_it_holds(case, files):
    with pytest.raises(
        ValueError, match=r"num_inference_steps=50, but its learned tables have 3, 6, 9 network calls"
    ):
        case.latents(scheduler_of(*files.values()), 50, case.noise())


def test_a_scheduler_without_tables_says_how_to_make_one(case):
    with pytest.raises(ValueError, match=r"none: make it with EPDScheduler.from_predictor"):
        case.latents(EPDScheduler(), 6, case.noise())


def test_two_tables_of_one_number_of_calls_are_refused(files):
    with pytest.raises(ValueError, match=r"epd.pkl: a second table of 6 network calls"):
        scheduler_of(files["epd"], files["epd"])


def test_a_table_of_the_other_kind_of_model_is_refused(files, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"noise schedule .*, but the scheduler.s config is that of a flow",
    ):
        EPDScheduler.from_predictor(files["epd"], config={"shift": 3.0})
    flow = random_table("epd", flowmatch(3, shift=3.0), tmp_path, "sd3")
    with pytest.raises(
        ValueError,
        match=r"made for a flow-matching model, but the scheduler.s config",
    ):
        EPDScheduler.from_predictor(flow, config=CONFIG)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr is true"):
        EPDScheduler.from_predictor(files["epd"], config={**CONFIG, "rescale_betas_zero_snr": True})
    unknown = random_table("plugin", flowmatch(3, shift=3.0), tmp_path, None)
    with pytest.raises(ValueError, match=r"records no backbone; give config=pipe.scheduler.config"):
        EPDScheduler.from_predictor(unknown)


def test_a_flow_table_that_begins_below_noise_level_1_is_refused(tmp_path):
    path = random_table("epd", 0.9 * flowmatch(3, shift=3.0), tmp_path, "sd3")
    with pytest.raises(ValueError, match=r"tables\['6'\].nodes is 0.9, expected a start at noise level 1"):
        EPDScheduler.from_predictor(path, config={"shift": 3.0})


@pytest.mark.parametrize("given", [{"sigmas": [14.0, 5.0, 1.0]}, {"timesteps": [900, 500, 10]}])
def test_custom_times_are_refused(case, files, given):
    """Pipelines look for `timesteps` in the signature of set_timesteps and refuse it themselves."""
    with pytest.raises(
        ValueError, match=r"noise levels are learned|does not support custom timestep schedules"
    ):
        case.latents(scheduler_of(files["tableau1"]), 3, case.noise(), **given)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_uniform_sigmas_that_pipelines_pass_of_their_own_are_their_number(count):
    from integrations.diffusers.epd_scheduler import _length_of_default

    assert _length_of_default(torch.linspace(1, 1 / count, count).numpy()) == count
    assert _length_of_default(torch.linspace(1, 0, count + 1)[:-1].tolist()) == count


def test_denoising_end_is_refused(files, tmp_path):
    pipe = StableDiffusionXLPipeline(**sdxl_parts(tmp_path))
    case = Case(pipe, (4, 8, 8), {"prompt": "a cat", "height": 64, "width": 64})
    with pytest.raises(ValueError, match="denoising_end can cut inside a step"):
        case.latents(scheduler_of(files["epd"]), 6, case.noise(), denoising_end=0.8)


def test_a_step_after_the_last_is_refused(files):
    scheduler, x = scheduler_of(files["tableau1"]), torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones_like(x), t, x).prev_sample
    assert scheduler.step_index == 3
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 0, x)


def test_a_dynamic_shift_other_than_the_tables_is_a_warning(tmp_path):
    """FLUX predictors may record no shift: their nodes do."""
    pipe = FluxPipeline.from_pretrained(save_flux(tmp_path / "flux"))
    size = {"height": 64, "width": 64, "max_sequence_length": 8}
    case = Case(pipe, (16, 64), {"prompt": "a cat"} | size)
    path = random_table("tableau1", flowmatch(4, mu=0.8), tmp_path, "flux")
    scheduler = EPDScheduler.from_predictor(path, config=pipe.scheduler.config)
    assert scheduler.config.mu == pytest.approx(0.8, abs=1e-9)
    with capture_warnings() as messages:
        case.latents(scheduler, 3, case.noise())
    assert messages == ["EPDScheduler: learned for mu 0.8000, but this image size has 0.4594"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["epd", "plugin", "tableau1"])
def test_a_callback_that_changes_latents_moves_all_that_follows(case, files, kind, in_place):
    """After the last call but one, the result moves by what was added and by the last velocity's change."""
    predictor = load_predictor(files[kind])
    calls, moved = predictor.cost().evaluations, torch.full((1, 4, 8, 8), 0.25)
    last, outputs = calls - 2, []
    hook = case.pipe.unet.register_forward_hook(lambda m, a, o: outputs.append(o[0]))

    def callback(pipe, i, t, kwargs):
        if i != last:
            return {}
        if in_place:
            kwargs["latents"].add_(moved)
            return {}
        return {"latents": kwargs["latents"] + moved}

    plain = case.latents(scheduler_of(files[kind]), calls, case.noise())
    changed = case.latents(scheduler_of(files[kind]), calls, case.noise(), callback_on_step_end=callback)
    hook.remove()
    guided = [
        u + 4.0 * (c - u) for u, c in (o.chunk(2) for o in (outputs[calls - 1], outputs[2 * calls - 1]))
    ]
    weight = predictor.cost().output[-1].item()
    assert (changed - plain - moved - weight * (guided[1] - guided[0])).abs().max() < 1e-4
    assert (guided[1] - guided[0]).abs().max() > 1e-3


def test_a_callback_that_gives_the_same_latents_changes_nothing(case, files):
    same = case.latents(scheduler_of(files["epd"]), 6, case.noise())
    callback = {"callback_on_step_end": lambda p, i, t, k: {"latents": k["latents"].clone()}}
    assert torch.equal(case.latents(scheduler_of(files["epd"]), 6, case.noise(), **callback), same)


def test_an_interrupted_run_leaves_nothing_behind(case, files):
    scheduler = scheduler_of(files["epd"])
    expected = case.latents(scheduler, 6, case.noise())

    def interrupt(pipe, i, t, kwargs):
        pipe._interrupt = i == 2
        return {}

    stopped = case.latents(scheduler, 6, case.noise(), callback_on_step_end=interrupt)
    assert not torch.equal(stopped, expected)
    assert torch.equal(case.latents(scheduler, 6, case.noise()), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_in_the_middle_of_a_run_goes_on_alike(files, duplicate):
    scheduler, x = scheduler_of(files["plugin"]), torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(9)
    for t in scheduler.timesteps[:4]:
        x = scheduler.step(x.sin(), t, x).prev_sample
    other, y = duplicate(scheduler), x
    for t in scheduler.timesteps[4:]:
        x, y = scheduler.step(x.sin(), t, x).prev_sample, other.step(y.sin(), t, y).prev_sample
    assert torch.allclose(x, y, rtol=0, atol=1e-6)


def test_another_pipeline_of_the_same_parts_takes_the_scheduler_along(case, files):
    case.latents(scheduler_of(files["epd"]), 6, case.noise())
    other = AutoPipelineForImage2Image.from_pipe(case.pipe)
    other.set_progress_bar_config(disable=True)
    assert isinstance(other.scheduler, EPDScheduler)
    picture = torch.rand(1, 3, 64, 64)
    assert (
        other("a cat", picture, strength=0.5, num_inference_steps=6, output_type="latent")[0].isfinite().all()
    )


def test_half_precision_costs_no_more_than_on_the_projects_own_path(digits):
    """The error against float32 (RMSE) is at most 1.3 times that of the own path in bfloat16."""
    backend, path = digits["ldm"], table_file("epd-g7.5-d4")
    predictor, config = load_predictor(path), backend.pipe.scheduler.config
    case = digits_case(backend, "ldm")
    exact = case.latents(scheduler_of(path), 6, case.noise(2))
    half = copy.deepcopy(backend.pipe.unet).bfloat16()
    parts = backend.pipe.components | {
        "unet": half,
        "text_encoder": copy.deepcopy(backend.pipe.text_encoder).bfloat16(),
    }
    drop_in = Case(StableDiffusionPipeline(**parts, requires_safety_checker=False), case.shape, case.options)
    embeds = {
        "prompt_embeds": half_embeds(case, PROMPTS),
        "negative_prompt_embeds": half_embeds(case, ["", ""]),
    }
    actual = drop_in.latents(
        EPDScheduler.from_predictor(path, config=config), 6, case.noise(2).bfloat16(), **embeds, prompt=None
    )

    def own_velocity(x, sigma):
        sigma = sigma.expand(len(x))
        scale, t = (1 + sigma**2).rsqrt().float().view(-1, 1, 1, 1), scheduler_of(path)._time(sigma).float()
        text = torch.cat([embeds["negative_prompt_embeds"], embeds["prompt_embeds"]])
        u, c = half((x * scale).bfloat16().repeat(2, 1, 1, 1), t.repeat(2), text).sample.float().chunk(2)
        return u + 7.5 * (c - u)

    with torch.no_grad():
        own = own_latents(predictor, own_velocity, case.noise(2))
    drop_in_error, own_error = ((x.float() - exact).square().mean().sqrt() for x in (actual, own))
    assert drop_in_error < 1.3 * own_error
    assert own_error > 0


def half_embeds(case, prompts):
    return case.pipe.encode_prompt(prompts, "cpu", 1, False)[0].bfloat16()


def test_afs_tables_begin_at_their_first_point(case, tmp_path):
    """Without an evaluation at the first node, the first input is a multiple of the start."""
    nodes = noise_nodes(CONFIG, 3)
    table = SolverTable(torch.tensor([[0.3, 0.8], [0.2, 0.6]]).double(), torch.full((2, 2), 0.5).double())
    path = tmp_path / "afs.pkl"
    save_predictor(Predictor(table, Spec(backend="ldm", afs=True), nodes), path)
    actual = case.latents(scheduler_of(path), 5, case.noise())
    predictor = load_predictor(path)
    assert isinstance(predictor.solver(), EPD)
    expected = own_latents(predictor, velocity_of(case, CONFIG), case.noise())
    assert (actual - expected).abs().max() < CLOSE * max(1.0, expected.abs().max())
