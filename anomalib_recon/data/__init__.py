# SPDX-License-Identifier: Apache-2.0

"""Datamodules: synthetic data, labelled anomalies to train on, deep grey images, several categories, a CIFAR class."""

from anomalib_recon import discovery

from .deep_grey_folder import DeepGreyFolder, DeepGreyPredictDataset
from .demo import DemoAD
from .labelled_folder import LabelledFolder
from .one_class_cifar10 import OneClassCIFAR10
from .several_categories import SeveralCategories

__all__ = [
    "DeepGreyFolder",
    "DeepGreyPredictDataset",
    "DemoAD",
    "LabelledFolder",
    "OneClassCIFAR10",
    "SeveralCategories",
]

discovery.publish(__name__)
