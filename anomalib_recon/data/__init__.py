# SPDX-License-Identifier: Apache-2.0

"""Datamodules: drawn data, labelled anomalies to train on, several categories at once, one class of CIFAR-10."""

from anomalib_recon import discovery

from .demo import DemoAD
from .labelled_folder import LabelledFolder
from .one_class_cifar10 import OneClassCIFAR10
from .several_categories import SeveralCategories

__all__ = ["DemoAD", "LabelledFolder", "OneClassCIFAR10", "SeveralCategories"]

discovery.publish(__name__)
