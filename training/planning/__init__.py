"""Every decision that follows from a recipe, its data and the place where it runs, made once."""

from training.planning.make import make_plan, per_device_batch_size, plan_run, teacher_of, without_algorithms
from training.planning.place import Place, choose_place
from training.planning.plan import Epoch, Plan, PlannedAlgorithm, Steps

__all__ = [
    "Epoch",
    "Place",
    "Plan",
    "PlannedAlgorithm",
    "Steps",
    "choose_place",
    "make_plan",
    "per_device_batch_size",
    "plan_run",
    "teacher_of",
    "without_algorithms",
]
