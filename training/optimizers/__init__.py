"""Optimizers by name, and those of this project: torch's and Composer's by one kernel, Muon, schedule-free."""

from training.optimizers.by_name import (
    OTHERS,
    SCHEDULE_FREE,
    build_optimizer,
    check_settings,
    find,
    other_peak_learning_rate,
    parameter_groups,
    peak_learning_rate,
    settings_of,
)

__all__ = [
    "OTHERS",
    "SCHEDULE_FREE",
    "build_optimizer",
    "check_settings",
    "find",
    "other_peak_learning_rate",
    "parameter_groups",
    "peak_learning_rate",
    "settings_of",
]
