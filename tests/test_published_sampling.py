"""The published README's sampling commands, word for word, where the weights are tiny pipelines of the real
layouts and sizes.

What stands for the weights is given by --model-id, or added behind the command as --model-path.
"""

from published import run

from .generation.command import manifest

SAMPLE_SD15 = (
    "MASTER_PORT=12345 python sample.py --predictor_path exps/sd15/sd15-best.pkl --prompt-file"
    ' src/prompts/test.txt --seeds "0-19" --batch 4 --outdir samples/sd15'
)
SAMPLE_SD3 = (
    'python sample_sd3.py --predictor exps/sd3-1024/sd3-1024-best.pkl --seeds "0" --outdir samples/sd3'
    ' --prompt "a cat on a red sofa"'
)
SAMPLE_FLUX = (
    "python sample_flux.py --predictor exps/flux/flux-best.pkl --model-id {model} --prompt-file"
    ' src/prompts/test.txt --seeds "0" --outdir samples/flux'
)


def test_sample_sd15(project):
    """On the digits' Stable Diffusion: 20 images of 512 pixels take minutes here (tests/test_moving_in.py
    makes one).
    """
    text = run(project, SAMPLE_SD15, "--model-path", "digits/sd")
    assert "epd from exps/sd15/sd15-best.pkl: serial depth 20, 30 evaluations an image, guidance 7.5" in text
    prompts = (project / "src/prompts/test.txt").read_text().splitlines()
    assert [(r["seed"], r["prompt"]) for r in manifest(project / "samples/sd15")] == list(
        enumerate(prompts[:20])
    )
    assert (project / "samples/sd15/000000/000019.png").is_file()


def test_sample_sd3(project, models):
    text = run(project, SAMPLE_SD3, "--model-path", str(models["sd3-1024"]))
    assert "1 images in samples/sd3" in text
    assert [r["prompt"] for r in manifest(project / "samples/sd3")] == ["a cat on a red sofa"]


def test_sample_flux(project, models):
    text = run(project, SAMPLE_FLUX.format(model=models["flux"]), "--dtype", "float32")
    assert "epd from exps/flux/flux-best.pkl: serial depth 16, 24 evaluations" in text


def test_the_empty_prompt_stands_in_for_none_with_a_note(project, models):
    text = run(
        project,
        "python sample_sd3.py --resolution 512 --seeds 0 --outdir samples/none",
        "--model-path",
        str(models["sd3-512"]),
    )
    assert "epd from exps/sd3-512/sd3-512-best.pkl" in text
    assert "note: neither --prompt nor --prompt-file is given: the empty prompt is used" in text
    assert [r["prompt"] for r in manifest(project / "samples/none")] == [""]
