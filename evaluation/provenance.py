"""Which rewards a solver was trained on, as far as its predictor file holds them."""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief

from common.files import read_file
from solvers import UserError, load_predictor
from solvers.predictor.safe_pickle import MAX_BYTES


@dataclass(frozen=True)
class Training:
    """The rewards that a solver was trained on; not `complete` where there may be others."""

    rewards: frozenset[str]
    complete: bool

    def covers(self, parts: Collection[str]) -> bool | None:
        """Whether any of the scores that a metric combines was trained on; None where it is unknown."""
        if self.rewards & set(parts):
            return True
        return False if self.complete else None


def find_predictors(places: Sequence[Path] | None) -> dict[str, Path]:
    """The .pkl files below some folders by the SHA-256 of their bytes; by default those under exps.

    A folder that was named but is not there: UserError.
    """
    for place in places or ():
        if not place.is_dir():
            raise UserError(f"--exps {place}: not a folder; give one that holds predictor files")
    files = [p for place in places or [Path("exps")] for p in sorted(place.rglob("*.pkl"))]
    small = [path for path in files if path.is_file() and path.stat().st_size <= MAX_BYTES]
    return {hashlib.sha256(read_file(path, MAX_BYTES)).hexdigest(): path for path in small}


def training_of(settings: Mapping, predictors: Mapping[str, Path]) -> Training:
    """What made the images of a manifest's settings was trained on: nothing for a baseline, else what its
    predictor says.
    """
    if "predictor" not in settings:
        return Training(frozenset(), False)
    if settings["predictor"] is None:
        return Training(frozenset(), True)
    return training_of_file(settings["predictor"], predictors)


def training_of_file(start_of_hash: str, predictors: Mapping[str, Path]) -> Training:
    """What the predictor with a hash that starts so, and those that it was learned from, were trained on."""
    is_hash = re.fullmatch(r"[0-9a-f]{16,64}", start_of_hash)
    path = next((p for sha, p in predictors.items() if is_hash and sha.startswith(start_of_hash)), None)
    provenance = {"format": "published"} if path is None else load_predictor(path).provenance
    if provenance.get("format") == "published":  # without the rewards
        return Training(frozenset(), False)
    rewards = {"judge"} if provenance.get("trained_on_the_judge") else set()
    rewards |= names_of(provenance.get("reward"), path)
    parent = re.search(r"sha256:([0-9a-f]{16,})", str(provenance.get("parent")))
    before = training_of_file(parent[1], predictors) if parent else Training(frozenset(), True)
    return Training(before.rewards | rewards, before.complete)


def names_of(reward: object, path: Path | None) -> set[str]:
    """The names of a reward's protocol, its own and those of its heads."""
    if reward is None:
        return set()
    options = reward.get("options", {}) if isinstance(reward, dict) else None
    heads = options.get("heads", {}) if isinstance(options, dict) else None
    if not isinstance(reward, dict) or not isinstance(reward.get("name"), str) or not isinstance(heads, dict):
        raise UserError(f"{path}: provenance.reward is {brief(reward)}, expected a reward's name and options")
    return {reward["name"], *heads}
