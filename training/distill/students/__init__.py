"""The kinds of students, and the predictor that one starts from."""

from solvers import resolve_predictor_path
from solvers.predictor.spec import require_match

from ...start import Start, load_start
from ..config import DistillConfig
from .student import LearnedModule, Student, StudentData, StudentKind
from .table import TableKind
from .tableau import TableauKind

STUDENTS: dict[str, StudentKind] = {kind.name: kind for kind in (TableKind(), TableauKind())}
START_NAMES = frozenset(name for kind in STUDENTS.values() for name in kind.start_names)

__all__ = ["STUDENTS", "LearnedModule", "Student", "StudentData", "StudentKind", "find_start"]


def find_start(config: DistillConfig) -> Start | None:
    """The predictor of student.start, or None where that is not a predictor; one that does not fit:
    ConfigError.
    """
    student = config.student
    if student.start in START_NAMES:
        return None
    start = load_start(resolve_predictor_path(student.start))
    backend = (config.backend.name, start.predictor.spec.backend)
    facts = STUDENTS[student.kind].start_facts(config, start)
    require_match({"backend.name": backend, **facts}, f"student.start {start.path}")
    return start
