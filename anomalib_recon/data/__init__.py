# SPDX-License-Identifier: Apache-2.0

"""Datamodules: data to try the models without a download, labelled anomalies to train on, one class of CIFAR-10."""

from anomalib_recon import discovery

from .demo import DemoAD
from .labelled_folder import LabelledFolder
from .one_class_cifar10 import OneClassCIFAR10

__all__ = ["DemoAD", "LabelledFolder", "OneClassCIFAR10"]

discovery.publish(__name__)
