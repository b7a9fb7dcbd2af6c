"""The options of a run, as they are given.

Convention: an option left out takes the preset's value.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from adapters.cli.output import Output
from adapters.cli.words import worded
from adapters.networks import DropoutMasks
from became_core.continual import ClassOrder

__all__ = ["Options"]


@dataclass(frozen=True)
@worded
class Options:
    """Learn a benchmark's tasks with one or more methods; compare them in a table.

    With no option: Split-MNIST (embedded); became, gpm and finetune; one seed.

    An option that shows no default has the preset's value if it is left out.
    """

    benchmark: str = "split-mnist"
    """What to learn: split-mnist, permuted-mnist (both embedded), split-cifar100, split-miniimagenet,
    split-tinyimagenet."""
    methods: tuple[str, ...] = ("became", "gpm", "finetune")
    """Which methods: became, became-paper, coma, ewc, ewc-online, finetune, hat, imm-mean, imm-mode, joint, packnet, a
    projector by itself: gpm, sgp, gpcns, nscl, ogd, trgp, or both, as in became+trgp; became-0, became-half, became-1
    and became-grid merge at that alpha, or at the best by the true loss."""
    projector: Literal["none", "gpm", "sgp", "gpcns", "nscl", "ogd", "trgp"] | None = None
    """The projector of all methods that name none; became's own is gpm."""
    seeds: tuple[int, ...] = (0,)
    """A run for each; a seed names the initial weights and every random draw."""
    preset: Literal["quick", "paper", "nscl"] = "quick"
    """The published protocol, or the same protocol on a schedule that two CPU cores finish; nscl, that of Adam-NSCL, is
    for split-cifar100 and split-tinyimagenet."""
    network: str | None = None
    """The backbone: mlp, alexnet, resnet18."""
    norm: Literal["batch", "running", "group"] | None = None
    """What alexnet and resnet18 normalise by: the batch's statistics, in testing too; in all but training running ones,
    estimated anew for every model; or each image's own, over groups of channels."""
    tasks: int | None = None
    """How many tasks the classes are split into; it must divide them."""
    class_order: ClassOrder = "label"
    """How classes are dealt to tasks: in the order of their labels, or in one that the seed draws."""
    first: int | None = None
    """Learn the first so many of them only."""
    epochs: int | None = None
    """Epochs of stage 1 (at most so many, if the schedule stops by itself)."""
    stage2_epochs: int | None = None
    """Epochs of stage 2."""
    lr: float | None = None
    """The learning rate that both stages begin with."""
    head_rate: float | None = None
    """How many times as fast heads learn, at any learning rate."""
    norm_rate: float | None = None
    """Likewise, normalisation and biases."""
    first_rate: float | None = None
    """Likewise, all other parameters, in the first task."""
    optimiser: Literal["sgd", "adam"] | None = None
    """What turns gradients into steps."""
    momentum: float | None = None
    """SGD's momentum."""
    weight_decay: float | None = None
    """What each parameter adds of itself to its gradient."""
    batch_size: int | None = None
    """Samples a step, in training and in evaluation."""
    augment: bool | None = None
    """Whether training images are cropped at random, after padding by 4 pixels, and flipped left to right."""
    validation: float | None = None
    """Fraction of each task's training samples held out."""
    threshold: float | None = None
    """Epsilon of gpm, sgp, gpcns and trgp for the first task."""
    increment: float | None = None
    """What epsilon grows by from task to task."""
    scale: float | None = None
    """The scale of sgp's and gpcns's importances."""
    nscl_ratio: float | None = None
    """How far above the smallest eigenvalue nscl still calls a direction null."""
    norm_penalty: float | None = None
    """The strength of a pull, as in ewc, on what gpm, sgp, gpcns, nscl and trgp cannot protect: normalisation and
    biases; at 0 these are frozen after the first task."""
    ogd_samples: int | None = None
    """Training samples of each task whose gradients ogd keeps."""
    ogd_capacity: int | None = None
    """How many directions ogd keeps in all."""
    decay: float | None = None
    """Gamma, what old tasks' curvature is multiplied by at each new one, in became, became-paper and ewc-online."""
    ewc_strength: float | None = None
    """EWC's lambda."""
    imm_transfer: bool | None = None
    """Whether imm trains a task from the model before it, or from the initial weights."""
    imm_pull: float | None = None
    """The strength of imm's pull to the model before (L2-transfer)."""
    coma_alpha: tuple[float, ...] | None = None
    """coma's coefficients, one a merge; the last one stays."""
    grid_points: int | None = None
    """How many coefficients became-grid tries."""
    packnet_share: float | None = None
    """The share of a layer's free weights that packnet prunes at each task."""
    hat_sharpness: float | None = None
    """How steep hat's gates become within an epoch."""
    hat_sparsity: float | None = None
    """What the units that a task uses cost in hat."""
    per: Literal["model", "layer", "leaf"] | None = None
    """What shares a coefficient in became."""
    precision: Literal["diagonal", "kronecker", "exact"] | None = None
    """The curvatures became merges by: both sides' diagonals, both sides' Kronecker factors, or the new task's exact
    one along the path beside the old tasks' calibrated diagonal."""
    projector_samples: int | None = None
    """Training samples of each task for the projector's memory; 0 for all."""
    curvature_samples: int | None = None
    """Training samples of each task for Fisher information and directional curvature; 0 for all."""
    path_points: int = 0
    """Trace the true loss and accuracy at so many points of every merging path."""
    data_dir: Path | None = None
    """A folder in the hub's layout; else the environment variable BECAME_DATA_DIR; else the hub."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, …"""
    mixed_precision: bool = False
    """Multiply in bfloat16 in training steps; weights, losses, normalisation, memory and all that is measured stay
    float32. A CPU without instructions for it only pretends to, ten times slower: see --dry-run."""
    dropout_masks: DropoutMasks = "numpy"
    """What draws dropout's masks: NumPy, the same ones for every framework, or the framework's own generator, which is
    where the network is."""
    deterministic: bool = False
    """Use operations alone that give the same bits every time, which a GPU's usual ones do not; a CPU's do anyway."""
    out: Path | None = None
    """The folder for results; runs/BENCHMARK-PRESET if not given."""
    dry_run: bool = False
    """Show the configuration, the numbers of parameters and of steps, and an estimate of the time; learn nothing."""
    resume: bool = False
    """Go on with what the folder holds, and fail if it holds nothing; a run of another backend is then gone on with."""
    tracker: Literal["none", "tensorboard", "trackio"] = "none"
    """What scalars are also written for, as a run goes: TensorBoard, beside the results, or Trackio."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)
