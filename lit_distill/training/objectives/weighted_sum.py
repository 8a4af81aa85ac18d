"""A weighted sum of objectives, each for a part of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_distill.data.batch import Batch
from lit_distill.errors import InputError
from lit_distill.training.objectives.base import Losses, Models, Objective
from lit_distill.training.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class Term:
    """One objective of a sum.

    Attributes:
        objective: The objective.
        weight: Factor of its student's loss, > 0; what it trains beside the student has no weight.
        start: Optimizer steps before it takes part.
        stop: Optimizer step from which it takes part no longer; None: it stays to the end.
    """

    objective: Objective
    weight: float = 1.0
    start: int = 0
    stop: int | None = None

    def active(self, step: int) -> bool:
        """Return whether it takes part in an optimizer step, counted from 0."""
        return self.start <= step and (self.stop is None or step < self.stop)


class WeightedSum(Objective):
    """The weighted sum of objectives, which share the student's samples of a step.

    Args:
        terms: The objectives, each with weight, start and stop.
    """

    def __init__(self, terms: list[Term]) -> None:
        super().__init__()
        edges = {0, *(t.start for t in terms), *(t.stop for t in terms if t.stop is not None)}
        idle = [edge for edge in sorted(edges) if not any(term.active(edge) for term in terms)]
        if idle or any(term.weight <= 0 for term in terms):
            found = [(type(t.objective).__name__, t.weight, t.start, t.stop) for t in terms]
            raise InputError(
                "WeightedSum: one of its terms must take part in every step, from step 0 to the "
                f"end, and every weight must be > 0, got (objective, weight, start, stop) {found}"
            )
        self.terms = terms
        self.objectives = nn.ModuleList(term.objective for term in terms)
        self.needs_base = any(each.needs_base for each in self._objectives())
        self.needs_companion = any(each.needs_companion for each in self._objectives())
        self.needs_target = any(each.needs_target for each in self._objectives())
        self.needs_trajectory = any(each.needs_trajectory for each in self._objectives())
        if sum(each.needs_companion for each in self._objectives()) > 1:
            raise InputError(
                "WeightedSum: there is one companion adapter, and more than one of its terms "
                "trains it; leave one out"
            )

    def _objectives(self) -> Sequence[Objective]:
        return list(self.objectives)  # type: ignore[arg-type]

    def check(self, settings: Settings) -> None:
        """Check the settings for every term."""
        for each in self._objectives():
            each.check(settings)

    def build(self, pipe: DiffusionPipeline) -> None:
        """Make the modules of every term."""
        for each in self._objectives():
            each.build(pipe)

    def groups(self, companion: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """Return the groups of every term, each with its own options."""
        return [group for each in self._objectives() for group in each.groups(companion)]

    def losses(self, models: Models, batch: Batch) -> Losses:
        """Return the weighted sum of the terms that take part in this step."""
        shared: Any = _Shared(models)
        students, companions, complete = [], [], True
        for term in self.terms:
            if not term.active(models.step):
                complete = False
                continue
            found = term.objective.losses(shared, batch)
            students.append(term.weight * found.student)
            companions += [] if found.companion is None else [found.companion]
            complete = complete and found.complete
        return Losses(_total(students), _total(companions) if companions else None, complete)


def _total(losses: list[Tensor]) -> Tensor:
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


class _Shared:
    """Models that compute a batch's rollout and target once for all terms."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._known: dict[tuple[str, int], Tensor] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._models, name)

    def student_rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, once computed."""
        return self._once("rollout", self._models.student_rollout, batch)

    def teacher_target(self, batch: Batch) -> Tensor:
        """Return the teacher's final latents, once computed."""
        return self._once("target", self._models.teacher_target, batch)

    def _once(self, name: str, function: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        key = name, id(batch)
        if key not in self._known:
            self._known[key] = function(batch)
        return self._known[key]
