"""The settings that a learned solver was made for, and how those of a command line or configuration merge
with them.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from reprlib import repr as brief
from typing import Any

from common.resolution import image_size

from ..schedules import dynamic_shift
from .options import MACHINE
from .plain_data import mapping, plain
from .safe_pickle import PredictorError

MADE_FOR = ("family", "resolution")  # options of a backbone that a table is made for; the others may differ


@dataclass(frozen=True)
class Spec:
    """The settings a table was made for; None where the file does not say. Names as in the published
    predictors.
    """

    dataset_name: str | None = None
    backend: str | None = None
    """Backbone family: ldm, sd3, flux or digits."""
    backend_config: dict = field(default_factory=dict)
    """Options of the backend: model_name_or_path, resolution, torch_dtype, ... Never a token."""
    num_steps: int | None = None
    """Number of nodes, one more than the table has rows."""
    num_points: int | None = None
    guidance_type: str | None = None
    guidance_rate: float | None = None
    schedule_type: str | None = None
    """polynomial, logsnr, time_uniform, discrete or flowmatch."""
    schedule_rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    flowmatch_mu: float | None = None
    flowmatch_shift: float | None = None
    afs: bool = False
    max_order: int = 1
    """1 is EPD-Solver; above 1 EPD-Plugin, the order of the extrapolation that places the points."""
    solver: str = "epd"
    """epd for a table, tableau for a whole tableau."""

    @property
    def family(self) -> str | None:
        """The family of the backbone; the digits have theirs as an option, by default Stable Diffusion 1."""
        return self.backend_config.get("family", "ldm") if self.backend == "digits" else self.backend

    def overridden(self, asked: Mapping[str, Any]) -> "Spec":
        """This spec with the values of `asked`, by field, that are not None; options of the backbone are
        merged.
        """
        values = {name: value for name, value in asked.items() if value is not None}
        values["backend_config"] = {**self.backend_config, **values.get("backend_config", {})}
        return replace(self, **values)

    def serves(self, resolution: int | str | None) -> bool:
        """Whether nodes made for this spec's resolution serve another one, of which one is a rectangle.

        They do but where the time shift depends on the number of pixels: then that must be the same.

        Raises:
            PredictorError: it is not.
        """
        recorded = self.backend_config.get("resolution")
        if resolution == recorded or None in (resolution, recorded):
            return True
        if isinstance(resolution, int) and isinstance(recorded, int):
            return False
        if self.flowmatch_mu is None and (self.family != "flux" or self.flowmatch_shift is not None):
            return True
        asked, made = (tokens_of(size) for size in (resolution, recorded))
        if asked == made:
            return True
        raise PredictorError(
            f"resolution {resolution}: the nodes are those of resolution {recorded}, where the time shift mu"
            f" is {dynamic_shift(made):.3g}; at {resolution} it is {dynamic_shift(asked):.3g}: learn a table"
            " there, or use a baseline, such as --solver dpmpp without a predictor"
        )

    def merged(
        self,
        asked: Mapping[str, Any],
        source: object,
        labels: Mapping[str, str] | None = None,
        may_differ: Collection[str] = (),
    ) -> "Spec":
        """This spec of a file with the values that a user asks for, where it records none or the same.

        Args:
            asked: values by field; None asks for nothing. Options of the backbone are under "backend_config".
            source: the file, for messages.
            labels: what the user calls a field or "backend_config.OPTION"; by default --backend-config NAME.
            may_differ: fields whose value may be another one than recorded.

        Raises:
            PredictorError: a value contradicts what the table was made for.
        """
        labels, options = labels or {}, asked.get("backend_config") or {}
        fields = [name for name in asked if name != "backend_config" and name not in may_differ]
        facts = {
            labels.get(name, f"--backend-config {name}"): (asked[name], vars(self)[name]) for name in fields
        }
        facts |= {
            labels.get(f"backend_config.{name}", name): (options.get(name), self.backend_config.get(name))
            for name in MADE_FOR
        }
        size = labels.get("backend_config.resolution", "resolution")
        if self.serves(facts[size][0]):
            del facts[size]
        require_match(facts, source)
        return self.overridden(asked)


def tokens_of(resolution: int | str | None) -> int:
    """FLUX's tokens of an image, of 16 pixels a side."""
    width, height = image_size(resolution or 1024)
    return (width // 16) * (height // 16)


def require_match(facts: Mapping[str, tuple[object, object]], source: object) -> None:
    """Refuse values that contradict what a file was made for.

    Args:
        facts: (asked, recorded) by what the user calls it; None asks for, or records, nothing.
        source: the file.

    Raises:
        PredictorError: the first contradiction, with both values.
    """
    for label, (asked, recorded) in facts.items():
        if asked is not None and recorded is not None and asked != recorded:
            raise PredictorError(
                f"{label} is {asked!r}, but {source} was made for {recorded!r}; leave it out, or use another"
                " predictor"
            )


SPEC_TYPES = {f.name: f.type for f in fields(Spec)}


def spec_from(values: Any) -> Spec:
    """A Spec of plain values, without options of a machine; an unknown key or a value of the wrong type is an
    error that names it.
    """
    values = mapping(values, "spec", SPEC_TYPES)
    checked_values: dict[str, Any] = {}
    for name, value in values.items():
        checked_values[name] = plain(_of_type(name, value), f"spec.{name}")
    if "backend_config" in checked_values:
        config = checked_values["backend_config"]
        checked_values["backend_config"] = {k: v for k, v in config.items() if k not in MACHINE}
    return Spec(**checked_values)


def _of_type(name: str, value: Any) -> Any:
    """The value of a field, an int as a float where that is expected; another type: PredictorError."""
    expected: Any = SPEC_TYPES[name]
    if "float" in str(expected) and type(value) is int:
        value = float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        named = expected.__name__ if isinstance(expected, type) else expected
        raise PredictorError(f"spec.{name} is {brief(value)}, expected {named}")
    if isinstance(value, float) and not math.isfinite(value):
        raise PredictorError(f"spec.{name} is {value}, expected a finite number")
    return value
