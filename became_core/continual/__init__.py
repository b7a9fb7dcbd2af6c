"""Continual learning: task streams, the base class of learners, methods, and ``learn``, the loop that runs them."""

from became_core.continual.adaptation import Adaptation
from became_core.continual.building import (
    build_method,
    check_settings,
    method_names,
    method_settings,
    projector_names,
)
from became_core.continual.callbacks import Callback
from became_core.continual.changes import BayesianDetector, Detector, PlateauDetector, Reservoir, standardised
from became_core.continual.data import Augmentation, Dataset, Task, TaskStream, Views
from became_core.continual.learner import Batch, Learner, TapMode
from became_core.continual.methods import Method
from became_core.continual.path_report import Along, alpha_estimates
from became_core.continual.recipes import METHODS, MethodRecipe
from became_core.continual.record import EpochEnd, MergePath, PathPoint, RunRecord, TaskEnd
from became_core.continual.rng import random_generator
from became_core.continual.run import learn
from became_core.continual.run_context import check_method
from became_core.continual.schedule import Annealed, Patience, RelativeRates, Schedule, Stepped, Training
from became_core.continual.segments import Segment, Segments, Watch, arrivals, check_watchable, find_segments
from became_core.continual.share import Share
from became_core.continual.splits import (
    ClassOrder,
    CurvatureData,
    ScoredPart,
    measured_on,
    permute_pixels,
    scored_on,
    split_classes,
    split_domains,
)
from became_core.continual.state import Memory, RunState
from became_core.continual.step import SGD, Adam, Constraint, Optimiser, Penalty, Trained
from became_core.continual.training import Best, Stage

__all__ = [
    "METHODS",
    "SGD",
    "Adam",
    "Adaptation",
    "Along",
    "Annealed",
    "Augmentation",
    "Batch",
    "BayesianDetector",
    "Best",
    "Callback",
    "ClassOrder",
    "Constraint",
    "CurvatureData",
    "Dataset",
    "Detector",
    "EpochEnd",
    "Learner",
    "Memory",
    "MergePath",
    "Method",
    "MethodRecipe",
    "Optimiser",
    "PathPoint",
    "Patience",
    "Penalty",
    "PlateauDetector",
    "RelativeRates",
    "Reservoir",
    "RunRecord",
    "RunState",
    "Schedule",
    "ScoredPart",
    "Segment",
    "Segments",
    "Share",
    "Stage",
    "Stepped",
    "TapMode",
    "Task",
    "TaskEnd",
    "TaskStream",
    "Trained",
    "Training",
    "Views",
    "Watch",
    "alpha_estimates",
    "arrivals",
    "build_method",
    "check_method",
    "check_settings",
    "check_watchable",
    "find_segments",
    "learn",
    "measured_on",
    "method_names",
    "method_settings",
    "permute_pixels",
    "projector_names",
    "random_generator",
    "scored_on",
    "split_classes",
    "split_domains",
    "standardised",
]
