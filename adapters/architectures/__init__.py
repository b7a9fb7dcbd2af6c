"""Networks described once, without a framework: layers, a network as a value, the benchmarks' networks by name."""

from adapters.architectures.architecture import Architecture, Backbone, Pass, Record, Tapped
from adapters.architectures.initial import initial_value, initial_values
from adapters.architectures.layers import (
    AveragePool,
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool,
    Parameter,
    ReLU,
    Residual,
    Shape,
    Step,
    Tanh,
    Weighted,
)
from adapters.architectures.masks import DropoutMasks, Mask, checked_masks, draw_mask, draw_masks
from adapters.architectures.networks import NETWORKS, alexnet, build_network, mlp, resnet18

__all__ = [
    "NETWORKS",
    "Architecture",
    "AveragePool",
    "Backbone",
    "BatchNorm",
    "Convolution",
    "Dropout",
    "DropoutMasks",
    "Flatten",
    "Layer",
    "Linear",
    "Mask",
    "MaxPool",
    "Parameter",
    "Pass",
    "ReLU",
    "Record",
    "Residual",
    "Shape",
    "Step",
    "Tanh",
    "Tapped",
    "Weighted",
    "alexnet",
    "build_network",
    "checked_masks",
    "draw_mask",
    "draw_masks",
    "initial_value",
    "initial_values",
    "mlp",
    "resnet18",
]
