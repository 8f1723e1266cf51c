"""The runs of a report by family: one backbone on one set of options, never compared across."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from solvers import UserError

from ..comparison import Run, compare
from ..naming import family_name, is_learned, run_names, solver_name
from ..verdicts import Verdict, mean_of, verdicts


@dataclass(frozen=True)
class Entry:
    """A run of a report, with its names: "EPD distilled", and the same with its cost."""

    run: Run
    solver: str
    """With the guidance, where runs of that solver in the family have several: a series of a plot."""
    name: str
    teacher: bool

    @property
    def learned(self) -> bool:
        """Whether a learned solver made it."""
        return is_learned(self.run)


@dataclass(frozen=True)
class Family:
    """Runs of one backbone, the teacher first; differences are to `reference`."""

    anchor: str
    name: str
    entries: list[Entry]
    reference: Entry

    @property
    def students(self) -> list[Entry]:
        """All but the teacher."""
        return [entry for entry in self.entries if not entry.teacher]

    @property
    def metrics(self) -> list[str]:
        """What all runs were scored with."""
        return list(self.reference.run.scores)

    @property
    def runs(self) -> list[Run]:
        """The runs that are compared."""
        return [entry.run for entry in self.students]

    def best(self, metric: str) -> Entry | None:
        """The entry of the highest mean, among those that were not trained on the metric."""
        fair = [e for e in self.students if e.run.scores[metric].summary["trained_on"] is not True]
        return max(fair, key=lambda e: mean_of(e.run, metric), default=None)

    def differences(self) -> list[tuple[Entry, dict[str, dict]]]:
        """The comparison of each entry but the reference with that, by metric."""
        reference = self.reference.run
        return [
            (entry, {metric: compare(reference, entry.run, metric) for metric in self.metrics})
            for entry in self.entries
            if entry is not self.reference
        ]

    def headline(self) -> list[Verdict]:
        """The best learned run by the first metric that one was not trained on, against the best baselines of
        its cost.
        """
        for metric in self.metrics:
            fair = [
                run
                for run in self.runs
                if is_learned(run) and run.scores[metric].summary["trained_on"] is not True
            ]
            for run in sorted(fair, key=lambda run: mean_of(run, metric), reverse=True):
                if against := verdicts(run, self.runs, metric):
                    return against
        return []

    def verdicts(self) -> list[Verdict]:
        """Every learned run on every metric against the best baselines of its cost."""
        learned = [run for run in self.runs if is_learned(run)]
        return [v for metric in self.metrics for run in learned for v in verdicts(run, self.runs, metric)]

    def name_of(self, run: Run) -> str:
        """The full name of a run."""
        return next(entry.name for entry in self.entries if entry.run is run)

    def solver_of(self, run: Run) -> str:
        """The name of a run without its cost."""
        return next(entry.solver for entry in self.entries if entry.run is run)


def families_of(
    runs: Sequence[Run], predictors: Mapping[str, Path], teachers: Collection[Path]
) -> list[Family]:
    """The runs by backbone, in the order in which these come first; the first run of a family that is no
    teacher is its reference.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        facts = [run.settings.get("backbone"), run.settings.get("config")]
        groups.setdefault(json.dumps(facts, sort_keys=True), []).append(run)
    titles = [family_name(group, predictors) for group in groups.values()]
    count = Counter(titles)
    families = []
    for at, (title, group) in enumerate(zip(titles, groups.values(), strict=True), 1):
        place = group[0].folder.resolve().parent.name
        name = f"{title} ({place})" if count[title] > 1 else title
        families.append(family_of(f"family-{at}", name, group, predictors, teachers))
    return families


def family_of(
    anchor: str,
    name: str,
    runs: Sequence[Run],
    predictors: Mapping[str, Path],
    teachers: Collection[Path],
) -> Family:
    """A family with its teachers first."""
    titles, series = run_names(runs, predictors), series_names(runs, predictors)
    entries = [
        Entry(run, f"teacher: {solver}", f"teacher: {title}", True)
        if run.folder in teachers
        else Entry(run, solver, title, False)
        for run, solver, title in zip(runs, series, titles, strict=True)
    ]
    students = [entry for entry in entries if not entry.teacher]
    if not students:
        raise UserError(
            f"--teacher {runs[0].folder}: {name} has no other run; give --run FOLDER of the same backbone"
        )
    return Family(anchor, name, [*(e for e in entries if e.teacher), *students], students[0])


def series_names(runs: Sequence[Run], predictors: Mapping[str, Path]) -> list[str]:
    """The solver of each run, with its guidance where runs of that solver have several."""
    solvers = [(solver_name(run, predictors), run.settings.get("guidance")) for run in runs]
    scales = Counter(solver for solver, _ in set(solvers))
    return [f"{solver}, guidance {scale:g}" if scales[solver] > 1 else solver for solver, scale in solvers]
