"""A folder of images and a second run: what is complete stays, what is missing or torn is made again, and
other settings are refused.
"""

import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from common.records import exclusive, line_of
from digits import FOLDER

from .command import contents, invoke, manifest, refused


def test_a_second_run_makes_what_is_missing(tmp_path, table):
    run = f"--predictor_path {table} --prompt x --seeds 0-5 --batch 2 --outdir {tmp_path}/out"
    invoke(run)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    before = contents(tmp_path / "out", "*.png")
    (tmp_path / "out/000000/000003.png").unlink()
    invoke(run)
    assert contents(tmp_path / "out", "*.png") == before
    made_again = {p.stem for p, time in times.items() if p.stat().st_mtime_ns != time}
    assert made_again == {"000002", "000003"}  # the whole batch of the missing one


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swapped(path):
    path.write_bytes(path.with_name("000001.png").read_bytes())


def linked(path):
    path.unlink()
    path.symlink_to(path.with_name("000001.png"))


@pytest.mark.parametrize("damage", [empty, truncated, bit_flipped, swapped, linked])
def test_a_damaged_image_is_made_again(tmp_path, table, damage):
    run = f"--predictor_path {table} --prompt x --seeds 0-5 --batch 2 --outdir {tmp_path}/out --grid"
    invoke(run)
    before = contents(tmp_path / "out")
    damage(tmp_path / "out/000000/000003.png")
    invoke(run)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", [empty, truncated])
def test_damaged_grids_and_inters_are_made_again(tmp_path, table, damage):
    run = f"--predictor_path {table} --prompt x --seeds 0-1 --grid --return-inters --outdir {tmp_path}/out"
    invoke(run)
    before = contents(tmp_path / "out")
    for name in ("grids/batch_0000.png", "inters/000001/step01.png"):
        damage(tmp_path / "out" / name)
        invoke(run)
        assert contents(tmp_path / "out") == before


def test_a_manifest_of_an_earlier_version_is_gone_on_with(tmp_path, table):
    """It has neither sizes and hashes nor the weights: whole images stay, others are made again."""
    run = f"--predictor_path {table} --prompt x --seeds 0-3 --batch 2 --outdir {tmp_path}/out"
    invoke(run)
    before = contents(tmp_path / "out")
    path = tmp_path / "out/manifest.jsonl"
    newer = ("bytes", "sha256", "weights")
    older = [{k: v for k, v in record.items() if k not in newer} for record in manifest(tmp_path / "out")]
    path.write_text("".join(line_of(record) for record in older))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    invoke(run)
    assert manifest(tmp_path / "out") == older
    truncated(tmp_path / "out/000000/000003.png")
    invoke(run)
    assert contents(tmp_path / "out", "*.png") == {k: v for k, v in before.items() if k.endswith(".png")}
    made_again = {p.stem for p, time in times.items() if p.stat().st_mtime_ns != time}
    assert made_again == {"000002", "000003"}


def test_torn_manifest_line_is_made_again(tmp_path, table):
    run = f"--predictor_path {table} --prompt x --seeds 0-3 --batch 2 --outdir {tmp_path}/out"
    invoke(run)
    path = tmp_path / "out/manifest.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    invoke(run)
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"{", b"[", 1))
    assert "line 1" in refused(run)


def test_other_settings_are_refused_for_the_same_folder(tmp_path, table):
    run = f"--predictor_path {table} --outdir {tmp_path}/out"
    invoke(f"{run} --seeds 0-1 --prompt x")
    for other in ("--seeds 0-1 --prompt x --guidance 3", "--seeds 0-1 --prompt y", "--seeds 5,1 --prompt y"):
        assert "choose another --outdir" in refused(f"{run} {other}")
    assert len(manifest(tmp_path / "out")) == 2


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_other_weights_under_the_same_path_are_refused_for_the_same_folder(tmp_path, part):
    model = shutil.copytree(FOLDER, tmp_path / "model")
    run = (
        f"--backend ldm --model-path {model} --prompt x --solver euler --num-steps 2 --outdir {tmp_path}/out"
    )
    invoke(f"{run} --seeds 0")
    file = next((model / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    message = refused(f"{run} --seeds 0,1")
    assert re.search(r"holds images with weights '\w{32}', but this run has '\w{32}'", message)
    assert len(manifest(tmp_path / "out")) == 1


def test_options_that_change_images_are_settings(tmp_path):
    run = f"--backend digits --solver euler --num-steps 2 --seeds 0 --outdir {tmp_path}"
    invoke(run)
    assert "config" in refused(run, "--backend-config", '{"negative_prompt": "a bold red seven"}')


def test_what_is_missing_beside_the_images_is_made(tmp_path, table):
    run = f"--predictor_path {table} --prompt x --seeds 0-2 --outdir {tmp_path}/out"
    invoke(run)
    assert not (tmp_path / "out/grids").exists()
    invoke(f"{run} --grid --return-inters")
    assert (tmp_path / "out/grids/batch_0000.png").exists()
    assert len(list((tmp_path / "out/inters").rglob("*.png"))) == 9


def test_one_run_at_a_time_in_a_folder(tmp_path, table):
    run = f"--predictor_path {table} --prompt x --seeds 0 --outdir {tmp_path}"
    with exclusive(tmp_path):
        assert "another run" in refused(run)
    invoke(run)


@pytest.mark.parametrize("torn", [b'{"file": "x", "prompt": "s\xc3', b'{"file'])
def test_a_part_torn_anywhere_is_left_out(tmp_path, table, torn):
    (tmp_path / "manifest.part00000.jsonl").write_bytes(torn)
    invoke(f"--predictor_path {table} --prompt sé --seeds 0 --outdir {tmp_path}")
    assert [r["prompt"] for r in manifest(tmp_path)] == ["sé"]


def test_a_part_that_holds_something_else_is_refused(tmp_path, table):
    (tmp_path / "manifest.part00000.jsonl").write_bytes(b"5")
    assert "line 1" in refused(f"--predictor_path {table} --prompt x --seeds 0 --outdir {tmp_path}")
