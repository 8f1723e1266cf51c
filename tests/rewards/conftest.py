"""What the tests of rewards share: a CLIP of random weights in a folder, and what every reward is held to."""

import pickle
import shutil
from contextlib import contextmanager

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from digits import REWARD_FOLDER
from rewards import RewardError


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights with the tokenizer and image sizes of the embedded one."""
    folder = shutil.copytree(REWARD_FOLDER, tmp_path_factory.mktemp("clip") / "model")
    (folder / "model.safetensors").unlink()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = CLIPModel(CLIPConfig.from_pretrained(folder)).float()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


class Planted:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def planted(tmp_path):
    """What leaves a file behind when it is unpickled without care, and that file."""
    mark = tmp_path / "mark"
    trap = Planted(exec, f"open({str(mark)!r}, 'w').close()")
    pickle.loads(pickle.dumps(trap))
    assert mark.exists()  # it is able to
    mark.unlink()
    return trap, mark


@pytest.fixture(scope="session")
def refused():
    """Within it, a RewardError is raised, of one line that matches and names no host."""

    @contextmanager
    def check(match):
        with pytest.raises(RewardError, match=match) as caught:
            yield
        assert "\n" not in str(caught.value)
        assert "http" not in str(caught.value)

    return check


@pytest.fixture(scope="session")
def batch_free():
    """Scores of a batch, having seen that they are those of its images one by one and in another order."""

    def check(reward, images, prompts):
        together = reward(images, prompts)
        apart = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))])
        turned = reward(images.flip(0), prompts[::-1]).flip(0)
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together, turned, rtol=1e-5, atol=1e-5)
        assert together.dtype == torch.float32
        assert together.shape == (len(images),)
        assert together.std() > 1e-4  # they are not all one number
        return together

    return check
