"""Rewards by name: options, files that are missing, what is imported, and the protocol."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewards.files
from digits import REWARD_FOLDER
from rewards import NAMES, TRAINABLE, check_reward, load_reward

FILES = {
    "hps": ("HPS_v2.1_compressed.pt", "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir weights"),
    "imagereward": ("ImageReward.pt", "hf download THUDM/ImageReward ImageReward.pt --local-dir weights"),
    "aesthetic": ("sac+logos+ava1-l14-linearMSE.pth", "hf download camenduru/improved-aesthetic-predictor"),
    "mps": ("MPS_overall_checkpoint.pth", "put MPS_overall_checkpoint.pth, from its authors, into weights/"),
}
FOLDERS = {
    "clip": ("weights_path", "hf download openai/clip-vit-large-patch14"),
    "pickscore": (
        "weights_path",
        "hf download (yuvalkirstain/PickScore_v1|laion/CLIP-ViT-H-14-laion2B-s32B-b79K)",
    ),
}
USES = (check_reward, lambda name, config: load_reward(name, config, "cpu"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working folder without weights, and an empty hub cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards.files, "try_to_load_from_cache", lambda *where: None)


def test_all_but_the_judge_can_be_trained_on():
    assert set(NAMES) - set(TRAINABLE) == {"judge"}
    assert {"digits", "hps", "pickscore", "clip", "aesthetic", "imagereward", "mps", "multi"} == set(
        TRAINABLE
    )


@pytest.mark.parametrize("use", USES)
def test_unknown_names_and_options_are_refused_with_the_nearest(use, refused):
    with refused("expected one of digits.*did you mean pickscore"):
        use("pikscore", {})
    with refused(
        "reward 'hps': unknown option 'versoin', expected one of weights_path, version, model_name, amp .did"
        " you mean version"
    ):
        use("hps", {"versoin": "v2.1"})
    with refused("unknown option 'weights_path', it has none"):
        use("judge", {"weights_path": "x"})


@pytest.mark.parametrize("name", NAMES)
def test_every_reward_lists_its_options(name, refused):
    with refused(f"reward '{name}': unknown option 'zzz'"):
        check_reward(name, {"zzz": 1})


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_its_remedy(use, name, refused, clip_folder):
    file, remedy = FILES[name]
    config = (
        {"processor": str(clip_folder)}
        if name == "mps"
        else {"clip_path": str(clip_folder)}
        if name == "aesthetic"
        else {}
    )
    with refused(f"reward '{name}': no weights at weights/") as _:
        use(name, config)
    with pytest.raises(Exception) as caught:
        use(name, config)
    assert file in str(caught.value)
    assert remedy in str(caught.value)
    with refused(f"reward '{name}': weights_path 'nowhere.pt' is not a file"):
        use(name, config | {"weights_path": "nowhere.pt"})


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_folder_is_named_with_its_remedy(use, name, refused):
    option, remedy = FOLDERS[name]
    with refused(f"reward '{name}': .*{remedy}"):
        use(name, {})
    with refused(f"reward '{name}': '/nowhere/at/all'"):
        use(name, {option: "/nowhere/at/all"})


def test_a_check_accepts_what_is_there(tmp_path, clip_folder, monkeypatch, refused):
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("aesthetic", "mps", "imagereward"):
        (weights / FILES[name][0]).write_bytes(b"x")
    folder = str(clip_folder)
    assert check_reward("aesthetic", {"clip_path": folder}) == []
    assert check_reward("mps", {"processor": folder}) == []
    assert check_reward("pickscore", {"weights_path": folder, "processor": folder}) == []
    assert check_reward("digits", {}) == check_reward("judge", {}) == []
    with refused("threshold is 1, expected 0 <= threshold < 1"):
        check_reward("mps", {"processor": folder, "threshold": 1})
    with refused("unknown offset 'some'"):
        check_reward("imagereward", {"offset": "some"})
    with refused("folder '.' has no config.json"):
        check_reward("clip", {"weights_path": "."})
    monkeypatch.setattr(rewards.files, "is_offline_mode", lambda: False)
    (note,) = check_reward("clip", {})
    assert "openai/clip-vit-large-patch14 is not in the hub cache and will be fetched" in note
    with refused("neither a folder nor in the hub cache"):
        check_reward("clip", {"weights_path": "./missing"})


def test_the_hub_cache_is_looked_into(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(
        rewards.files, "try_to_load_from_cache", lambda repository, file: str(tmp_path / file)
    )
    assert check_reward("clip", {}) == []
    assert (
        rewards.files.find_file("imagereward", None, "ImageReward.pt", "THUDM/ImageReward")
        == tmp_path / "ImageReward.pt"
    )


def test_an_option_of_none_is_the_default():
    reward = load_reward("digits", {"weights_path": None}, "cpu")
    assert reward.files == [REWARD_FOLDER / "model.safetensors"]


@pytest.mark.parametrize(
    "name, file",
    [
        ("digits", REWARD_FOLDER / "model.safetensors"),
        ("judge", REWARD_FOLDER.parent / "judge" / "judge.safetensors"),
    ],
)
def test_the_protocol_says_what_a_score_was_made_with(name, file):
    reward = load_reward(name, {}, "cpu")
    protocol = json.loads(json.dumps(reward.protocol()))
    assert set(protocol) == {"name", "version", "weights", "preprocessing", "options"}
    assert protocol["name"] == name
    assert protocol["weights"] == [hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]]


def test_a_head_is_imported_only_when_used(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rewards; rewards.load_reward('judge', {},"
        " 'cpu');print([n for n in ('transformers', 'open_clip', 'rewards.clip_model', 'rewards.hps',"
        " 'rewards.multi') if n in sys.modules])"
    )
    root = Path(rewards.files.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_scores_are_of_float32_whatever_the_images():
    reward = load_reward("digits", {}, "cpu")
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(reward(images, ["a", "b"]), reward(images.float(), ["a", "b"]))
