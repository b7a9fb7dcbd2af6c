"""The options of a run: everything that a user may choose, described once.

The fields of ``RunOptions`` and the settings of the registered methods, projectors and benchmarks are the one
description. From them are made: the options of the command (``options``), the configuration of a run, its record and
what a run goes on from (``configuration.py``), and the command that repeats a run (``repeating.py``). Presets give
values for the same names.

Convention: values are plain (text, numbers, booleans, paths, tuples of them). A value that may change the result is
compared when a run goes on; a hint, such as the device, is not.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.networks import NETWORKS, DropoutMasks, Norm
from adapters.tracking import TRACKERS
from became_core import BecameError
from became_core.continual import ClassOrder, CurvatureData, ScoredPart, method_settings

__all__ = ["GROUPS", "Option", "RunOptions", "option_word", "options"]

# The groups of options, in the order of the help.
GROUPS = {
    "learn": "What to learn: the data, the tasks, the network",
    "methods": "Which methods, and their settings",
    "training": "How each stage is trained",
    "curvature": "What curvature, the projector's memory and merging paths are measured on",
    "where": "Where: the framework, the machine, the data, the folder of results",
    "output": "What is shown, and what else is written",
}


# With which values of other options some have nothing to do.
_ANNOUNCED = ("boundaries", ("known",))
_WITHOUT_ADAPTERS = ("lora", (None,))


def _option(
    help: str,
    group: str,
    default: Any = MISSING,
    *,
    hint: bool = False,
    flag: bool = False,
    idle: tuple[str, tuple[Any, ...]] | None = None,
) -> Any:
    """Return a field that is an option.

    Args:
        help: what ``--help`` says.
        group: where it stands in the help, a key of ``GROUPS``.
        default: its value where neither the user nor a preset gives one; without a default a preset must give one.
        hint: whether the result does not depend on it.
        flag: whether it is given without a value, to turn it on.
        idle: another option, and the values of it with which this one changes nothing.
    """
    return field(default=default, metadata={"help": help, "group": group, "hint": hint, "flag": flag, "idle": idle})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The values of those options that every run has."""

    benchmark: str = _option("What to learn", "learn", "split-mnist")
    tasks: int = _option(
        "How many tasks the classes are split into; it must divide them. 0 is for as many as the data have domains.",
        "learn",
    )
    first: int = _option("Learn only this many tasks, the first ones.", "learn")
    class_order: ClassOrder = _option(
        "How classes are assigned to tasks: in the order of their labels, or in an order that the seed draws.",
        "learn",
        "label",
    )
    single_head: bool = _option(
        "Let all tasks share one head (domain-incremental), whose classes are those of each task in their order. "
        "text-domains and text-sentiment have one anyway.",
        "learn",
        False,
        flag=True,
    )
    boundaries: Literal["known", "unknown"] = _option(
        "Whether the tasks are announced, or a detector cuts the stream of their samples where it changes. Unknown "
        "boundaries need one head for all tasks.",
        "learn",
        "known",
    )
    detector: Literal["bayesian", "plateau"] = _option(
        "What tells unknown boundaries: Bayesian online change-point detection, or plateaus and peaks of the loss.",
        "learn",
        "bayesian",
        idle=_ANNOUNCED,
    )
    hazard: float = _option(
        "How probable a change is at each batch, before anything is seen, for the bayesian detector.",
        "learn",
        0.01,
        idle=_ANNOUNCED,
    )
    reservoir: int = _option(
        "How many samples of what comes between two changes are stored, where boundaries are unknown; curvature and "
        "the projector's memory are computed from them alone.",
        "learn",
        200,
        idle=_ANNOUNCED,
    )
    gradual: int = _option(
        "Over how many samples one task turns into the next, where boundaries are unknown.",
        "learn",
        0,
        idle=_ANNOUNCED,
    )
    validation: float = _option("The fraction of each task's training samples that is held out.", "learn", 0.05)
    score_on: ScoredPart = _option(
        "On which samples of each task models are scored: test, or validation, those held out by --validation, which "
        "leaves the test samples unseen while settings are chosen. The schedule patience looks at them too, so that "
        "its scores on them are a little too high.",
        "learn",
        "test",
    )
    augment: bool = _option(
        "Whether training images are cropped at random, after padding by 4 pixels, and flipped left to right.",
        "learn",
        False,
    )
    network: str = _option(
        "The backbone: on PyTorch alone hf:NAME, of Hugging Face's hub or a folder in its layout, or timm:NAME, of the "
        "package timm; or one of these",
        "learn",
    )
    pretrained: bool = _option(
        "Begin with the weights that come with a network hf:NAME or timm:NAME, instead of drawing them.",
        "learn",
        False,
        flag=True,
    )
    norm: Norm = _option(
        "What alexnet and resnet18 normalise by: batch, the statistics of the batch, in testing too; running, the same "
        "in training and running statistics otherwise, estimated anew for every model; group, each image's own "
        "statistics over groups of channels.",
        "learn",
        "batch",
    )
    mixed_precision: bool = _option(
        "Multiply in bfloat16 in training steps; weights, losses, normalisation, memory and everything that is "
        "measured stay float32. A CPU without instructions for bfloat16 emulates them, ten times slower: see "
        "--dry-run.",
        "training",
        False,
        flag=True,
    )
    dropout_masks: DropoutMasks = _option(
        "What draws dropout's masks: numpy, the same masks for every framework, or framework, the framework's own "
        "generator, on the device of the network.",
        "training",
        "numpy",
    )
    compile: bool = _option(
        "Compile training steps as a whole: PyTorch captures them on a GPU, and compiles the network on the CPU; JAX "
        "makes whole epochs one program; TensorFlow compiles its steps in any case. Results are equal up to rounding.",
        "training",
        False,
        hint=True,
        flag=True,
    )
    schedule: Literal["annealed", "stepped", "patience"] = _option(
        "How the learning rate falls in each stage: annealed, along a cosine to 0; stepped, divided after given shares "
        "of the epochs; patience, divided when the validation loss stops improving, until it is small.",
        "training",
    )
    lr: float = _option("The learning rate at the beginning of both stages.", "training")
    epochs: int = _option("Epochs of stage 1; at most this many if the schedule is patience.", "training")
    stage2_epochs: int = _option("Epochs of stage 2; at most this many if the schedule is patience.", "training")
    lr_factor: float = _option(
        "What the schedules stepped and patience divide the rate by.",
        "training",
        2.0,
        idle=("schedule", ("annealed",)),
    )
    lr_steps: tuple[float, ...] = _option(
        "The shares of all epochs after which the schedule stepped divides the rate, each between 0 and 1.",
        "training",
        (0.375, 0.75),
        idle=("schedule", ("annealed", "patience")),
    )
    lr_patience: int = _option(
        "After how many epochs without a better validation loss the schedule patience divides the rate.",
        "training",
        6,
        idle=("schedule", ("annealed", "stepped")),
    )
    lr_minimum: float = _option(
        "The schedule patience ends a stage when its rate would fall below this.",
        "training",
        5e-5,
        idle=("schedule", ("annealed", "stepped")),
    )
    head_rate: float = _option(
        "What the learning rate of heads, also of one that all tasks share, is multiplied by.", "training", 1.0
    )
    norm_rate: float = _option(
        "What the learning rate of normalisation and of biases is multiplied by.", "training", 1.0
    )
    first_rate: float = _option(
        "What the learning rate of all weights but those of heads and normalisation is multiplied by in the first "
        "task.",
        "training",
        1.0,
    )
    freeze: tuple[str, ...] = _option(
        "Patterns, such as 'conv*', of the parameters or layers that stand still; heads always learn.", "training", ()
    )
    lora: int | None = _option(
        "Learn through low-rank adapters of this rank (LoRA): W + B A in place of W, which becomes the new W when a "
        "stage ends. Shared parameters without adapters stand still. A weight of a lower rank has adapters of that "
        "rank.",
        "training",
        None,
    )
    lora_layers: tuple[str, ...] = _option(
        "Patterns, such as '*.attn.*', of the weights or layers that have low-rank adapters.",
        "training",
        ("*",),
        idle=_WITHOUT_ADAPTERS,
    )
    lora_scale: float = _option(
        "What B A is multiplied by; lora_alpha / r in codes that divide by the rank.",
        "training",
        1.0,
        idle=_WITHOUT_ADAPTERS,
    )
    optimiser: Literal["sgd", "adam"] = _option("What turns gradients into steps.", "training", "sgd")
    momentum: float = _option("The momentum of SGD.", "training", 0.0)
    weight_decay: float = _option("How much of each parameter is added to its gradient.", "training", 0.0)
    batch_size: int = _option("Samples of a step, in training and in evaluation.", "training", 64)
    projector_samples: int = _option(
        "Training samples of each task for the projector's memory; 0 for all.", "curvature", 125
    )
    curvature_samples: int = _option(
        "Training samples of each task for Fisher information and directional curvature; 0 for all.", "curvature", 0
    )
    curvature_data: CurvatureData = _option(
        "On which samples of each task curvature, and the slopes and losses of merging paths, are measured: training, "
        "validation (those held out by --validation), or augmented (training images under a crop and a flip drawn "
        "once).",
        "curvature",
        "training",
    )
    path_points: int = _option(
        "Trace the true loss and accuracy at this many points of every merging path.", "curvature", 0
    )
    data_dir: Path | None = _option(
        "A folder with the data in the hub's layout; else the environment variable BECAME_DATA_DIR; else the hub.",
        "where",
        None,
        hint=True,
    )
    device: str = _option(
        "Where to compute: auto, cpu, cuda, cuda:1 and so on; on JAX also cuda:all, auto:all or cpu:all, whose devices "
        "share each batch. Under torchrun (torchrun --nproc-per-node N -m adapters.torch.run), of which every "
        "process computes a share of each batch, cuda is each process's own GPU.",
        "where",
        "auto",
        hint=True,
    )
    threads: int | None = _option(
        "How many threads the CPU computes with. Without it as many as the environment variable OMP_NUM_THREADS says; "
        "else one for a small network, which more threads make slower, and the framework's own choice for others.",
        "where",
        None,
        hint=True,
    )
    deterministic: bool = _option(
        "Use only operations that give the same bits every time. The usual operations of a GPU do not; those of a CPU "
        "always do.",
        "where",
        False,
        hint=True,
        flag=True,
    )
    save_every: float = _option(
        "Save a run after an epoch only if it was last saved at least this many seconds ago, for runs whose epochs are "
        "short beside the time to save them. It is saved at the end of a stage and after a signal in any case.",
        "where",
        0.0,
        hint=True,
    )
    tracker: str = _option(
        "Also write losses, rates, accuracies and alphas for a tracker while a run learns",
        "output",
        "none",
        hint=True,
    )


def option_word(name: str) -> str:
    """Return the word for an option on the command line.

    >>> option_word("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Option:
    """One option of the command, as the configuration or a setting describes it.

    Attributes:
        name: the name of the field or of the setting; on the command line with dashes.
        type: the type of its value.
        help: what ``--help`` says.
        group: where it stands in the help, a key of ``GROUPS``.
        flag: whether it is given without a value, to turn it on.
        names: the registered names that it chooses from; empty if it is no such choice.
        idle: another option, and the values of it with which this one changes nothing; None if there is none.
        owners: the methods and projectors, or the benchmarks, whose setting it is; empty if every run has it.
    """

    name: str
    type: Any
    help: str
    group: str
    flag: bool = False
    names: tuple[str, ...] = ()
    idle: tuple[str, tuple[Any, ...]] | None = None
    owners: tuple[str, ...] = ()

    def words(self, value: Any) -> list[str]:
        """Return the words on the command line that give the option this value.

        Raises:
            BecameError: if it is a flag that would have to be turned off.
        """
        if self.flag:
            if not value:
                raise BecameError(f"{option_word(self.name)} cannot be turned off.")
            return [option_word(self.name)]
        return [option_word(self.name), *map(str, value if isinstance(value, tuple) else [value])]


def options() -> dict[str, Option]:
    """Return every option by name: those of every run, then the settings of methods, projectors and benchmarks."""
    hints = get_type_hints(RunOptions)
    registered = {"benchmark": BENCHMARKS.names, "network": NETWORKS.names, "tracker": ("none", *TRACKERS)}
    of_presets = {
        name
        for benchmark in (BENCHMARKS[name] for name in BENCHMARKS.names)
        for preset in benchmark.presets.values()
        for name in preset.values
    }
    known: dict[str, Option] = {}
    for each in fields(RunOptions):
        names, help_text = registered.get(each.name, ()), each.metadata["help"]
        if names:
            help_text = f"{help_text}: {', '.join(names)}."
        if each.name not in of_presets and each.default not in (MISSING, None, False, ()):
            several = isinstance(each.default, tuple)
            help_text += f" (default: {' '.join(map(str, each.default)) if several else each.default})"
        known[each.name] = Option(
            each.name,
            hints[each.name],
            help_text,
            each.metadata["group"],
            each.metadata["flag"],
            names,
            each.metadata["idle"],
        )
    of_data = {name: each for benchmark in BENCHMARKS for name, each in BENCHMARKS[benchmark].settings.items()}
    for name, setting in {**method_settings(), **of_data}.items():
        if name in known:
            raise BecameError(f"the setting '{name}' of {setting.owners[0]} has the name of another option; rename it.")
        help_text = f"{setting.help[:1].upper()}{setting.help[1:]} ({', '.join(setting.owners)}"
        if name not in of_presets:
            default = " ".join(map(str, setting.default)) if isinstance(setting.default, tuple) else setting.default
            help_text += f"; default: {default}"
        help_text += ")"
        known[name] = Option(
            name, setting.type, help_text, "learn" if name in of_data else "methods", owners=setting.owners
        )
    return known
