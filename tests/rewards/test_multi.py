"""The weighted sum: by hand, from the heads' own scores; a head without weight is not loaded."""

import json

import pytest
import torch

from rewards import check_reward, load_reward
from rewards.imagereward import STD
from rewards.multi import HEADS, MultiReward, constants_of

PROMPTS = ["a red seven", "thin blue number 3", "zero"]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folders(clip_folder):
    return {
        "pickscore": {"weights_path": str(clip_folder), "processor": str(clip_folder)},
        "clip": {"weights_path": str(clip_folder)},
    }


@pytest.fixture(scope="module")
def own(folders):
    """The heads' scores, each loaded by itself."""
    return {
        name: load_reward(name, config, "cpu")(IMAGES, PROMPTS)
        for name, config in [("digits", {}), *folders.items()]
    }


def test_published_is_the_clipped_share_of_each_range(folders, own, batch_free):
    config = {
        "weights": {"pickscore": 3, "clip": 0.5, "digits": 2},
        "configs": folders,
        "constants": {"digits": [-0.2, 0.1]},
    }
    reward = load_reward("multi", config, "cpu")
    total = batch_free(reward, IMAGES, PROMPTS)
    for i in range(3):
        pick = min(max(own["pickscore"][i].item() / 26, 0), 1)
        clip = min(max(own["clip"][i].item(), 0), 1)
        digits = min(max((own["digits"][i].item() + 0.2) / 0.3, 0), 1)
        assert total[i].item() == pytest.approx((3 * pick + 0.5 * clip + 2 * digits) / 5.5, abs=1e-6)
    heads = reward.heads(IMAGES, PROMPTS)
    assert list(heads) == ["pickscore", "clip", "digits"]
    for name, scores in heads.items():
        torch.testing.assert_close(scores, own[name])
    assert torch.equal(reward.combine(heads), total)


def test_standard_is_the_standardised_score(folders, own):
    constants = {"pickscore": [-1, 2.5], "digits": [0.2, 0.05]}
    config = {
        "weights": {"pickscore": 1, "digits": 3},
        "normalise": "standard",
        "configs": folders,
        "constants": constants,
    }
    total = load_reward("multi", config, "cpu")(IMAGES, PROMPTS)
    expected = ((own["pickscore"] + 1) / 2.5 + 3 * (own["digits"] - 0.2) / 0.05) / 4
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_the_published_range_of_imagereward_is_of_its_standard_score():
    low, high = constants_of({"imagereward": 1.0}, "published", {})["imagereward"]
    for score in (-2.0, 0.0, 1.5):
        assert (score - low) / (high - low) == pytest.approx((score + 3 * STD) / 10, abs=1e-7)


def test_a_head_without_weight_is_neither_checked_nor_loaded(folders):
    config = {"weights": {"digits": 1, "hps": 0, "mps": 0}, "constants": {"digits": [0, 1]}}
    assert check_reward("multi", config) == []
    reward = load_reward("multi", config, "cpu")
    assert list(reward.rewards) == ["digits"]


def test_the_protocol_is_that_of_every_head(folders):
    config = {"weights": {"pickscore": 1, "clip": 2}, "configs": folders}
    protocol = json.loads(json.dumps(load_reward("multi", config, "cpu").protocol()))
    assert protocol["options"]["weights"] == {"pickscore": 1.0, "clip": 2.0}
    assert protocol["options"]["constants"] == {"pickscore": [0.0, 26.0], "clip": [0.0, 1.0]}
    assert [protocol["options"]["heads"][name]["name"] for name in ("pickscore", "clip")] == [
        "pickscore",
        "clip",
    ]
    assert protocol["weights"] == [
        h for head in protocol["options"]["heads"].values() for h in head["weights"]
    ]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"weights": {"hsp": 1}}, "unknown head 'hsp'.*did you mean hps"),
        ({"weights": {"judge": 1}}, "unknown head 'judge'"),
        ({"weights": {"digits": -1}}, "weights.digits is -1, expected a number of at least 0"),
        ({"weights": {"digits": float("nan")}}, "weights.digits is nan"),
        ({"weights": {"digits": "much"}}, "weights.digits is 'much'"),
        ({"weights": {"digits": 0}}, "no weight is above 0"),
        ({"weights": {"digits": 1}}, "no published constants for 'digits'; give constants.digits"),
        ({"weights": {"clip": 1}, "normalise": "standard"}, "no standard constants for 'clip'"),
        ({"weights": {"clip": 1}, "normalise": "ranks"}, "unknown normalise 'ranks'"),
        ({"weights": {"clip": 1}, "constants": {"clip": [1, 0]}}, "constants.clip is .*lowest, highest"),
        ({"weights": {"clip": 1}, "constants": {"clip": 1}}, "constants.clip is 1"),
        ({"weights": {"clip": 1}, "normalise": "standard", "constants": {"clip": [0, 0]}}, "std above 0"),
        (
            {"weights": {"clip": 1}, "configs": {"klip": {}}},
            "unknown head of configs 'klip'.*did you mean clip",
        ),
        (
            {"weights": {"imagereward": 1}, "configs": {"imagereward": {"offset": "published"}}},
            "offset has no use",
        ),
        (
            {"weights": {"clip": 1}, "configs": {"clip": {"weight_path": "x"}}},
            "reward 'clip': unknown option 'weight_path'",
        ),
        ({"weight": {"clip": 1}}, "unknown option 'weight'.*did you mean weights"),
    ],
)
def test_what_cannot_work_is_refused_before_and_when_loading(config, message, refused):
    for use in (check_reward, lambda name, config: load_reward(name, config, "cpu")):
        with refused(message):
            use("multi", config)


def test_every_trainable_reward_can_be_a_head():
    assert set(HEADS) == {"digits", "hps", "pickscore", "clip", "aesthetic", "imagereward", "mps"}
    assert MultiReward.name not in HEADS
