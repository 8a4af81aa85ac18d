"""One objective of every kind, cheap enough for tests."""

from lit_distill import (
    Adversarial,
    Consistency,
    DistributionMatching,
    Regression,
    Term,
    Trajectory,
    WeightedSum,
)

OWN = {"lr": 2e-3}
"""Learning rate of what is trained beside the student."""

OBJECTIVES = {
    "regression": Regression,
    "trajectory": Trajectory,
    "distribution matching": lambda: DistributionMatching(optimizer=OWN),
    "consistency": lambda: Consistency(segments=[4, 2], steps_per_stage=2, teacher_steps=12),
    "adversarial": lambda: Adversarial(layers=2, width=8, optimizer=OWN),
}


def all_together(start=0):
    """The sum of all objectives but trajectory, which needs other rows."""
    names = [name for name in OBJECTIVES if name != "trajectory"]
    terms = [Term(OBJECTIVES[name](), 1.0 if name == "regression" else 0.1) for name in names]
    terms[-1].start = start
    return WeightedSum(terms)
