"""Checkpoints on a disk: what they are, the curvature of their losses, and their merge in bounded memory.

A merge needs NumPy, ml_dtypes and, for plans in YAML, PyYAML; it loads no framework. PyTorch is needed to read
PyTorch's own files, and to measure curvature from data.
"""

from adapters.checkpoints.fisher_files import FisherFile, add_fisher_files
from adapters.checkpoints.folders import Checkpoint, open_checkpoint
from adapters.checkpoints.merge import MergePreview, MergeReport, merge_checkpoints, preview
from adapters.checkpoints.plan import MergePlan, PlannedModel, Setting
from adapters.checkpoints.plan_file import read_plan

__all__ = [
    "Checkpoint",
    "FisherFile",
    "MergePlan",
    "MergePreview",
    "MergeReport",
    "PlannedModel",
    "Setting",
    "add_fisher_files",
    "merge_checkpoints",
    "open_checkpoint",
    "preview",
    "read_plan",
]
