# SPDX-License-Identifier: Apache-2.0
"""The operators as layers."""

from .partial_conv import PartialConv2d, PartialUpConv2d, prepack

__all__ = ["PartialConv2d", "PartialUpConv2d", "prepack"]
