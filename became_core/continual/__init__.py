"""Continual learning: task streams, the learner protocol, methods, and the loop that runs them."""

from became_core.continual.augmentation import Augmentation, Views
from became_core.continual.callbacks import Callback
from became_core.continual.estimates import Along, alpha_estimates
from became_core.continual.learner import Batch, Constraint, Learner, Penalty, TapMode, Trained
from became_core.continual.loop import learn
from became_core.continual.methods import METHODS, PROJECTORS, Method, MethodSettings, build_method
from became_core.continual.optimisers import SGD, Adam, Optimiser
from became_core.continual.record import EpochEnd, MergePath, PathPoint, RunRecord, TaskEnd
from became_core.continual.schedule import Annealed, Patience, RelativeRates, Schedule, Stepped
from became_core.continual.seeding import random_stream
from became_core.continual.state import Memory, RunState
from became_core.continual.stream import ClassOrder, Dataset, Task, TaskStream, permute_pixels, split_classes
from became_core.continual.training import Best, Stage, Training

__all__ = [
    "METHODS",
    "PROJECTORS",
    "SGD",
    "Adam",
    "Along",
    "Annealed",
    "Augmentation",
    "Batch",
    "Best",
    "Callback",
    "ClassOrder",
    "Constraint",
    "Dataset",
    "EpochEnd",
    "Learner",
    "Memory",
    "MergePath",
    "Method",
    "MethodSettings",
    "Optimiser",
    "PathPoint",
    "Patience",
    "Penalty",
    "RelativeRates",
    "RunRecord",
    "RunState",
    "Schedule",
    "Stage",
    "Stepped",
    "TapMode",
    "Task",
    "TaskEnd",
    "TaskStream",
    "Trained",
    "Training",
    "Views",
    "alpha_estimates",
    "build_method",
    "learn",
    "permute_pixels",
    "random_stream",
    "split_classes",
]
