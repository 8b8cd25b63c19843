# SPDX-License-Identifier: Apache-2.0
"""The papers' networks on the fused ops: `build_model`, `build_discriminator`, `load_published`, `export_onnx`."""

from .aot_gan import AOTGAN, AOTGANDiscriminator, AOTGANNet, SMPatchGAN
from .base import Discriminator, InpaintingModel, Prediction
from .cgan_pc_rn import CGANPCRN, CGANPCRNDiscriminator
from .deepgin import DeepGIN, DeepGINDiscriminator, DeepGINGenerator, DeepGINPrediction, MultiScaleDiscriminator
from .export import export_onnx
from .pconv import PConv, PConvUNet
from .published import key_of, load_published
from .region_wise import RegionWise, RegionWiseDiscriminator, RegionWisePrediction
from .registry import build_discriminator, build_model
from .rn import RN, RNDiscriminator, RNNet

__all__ = [
    "AOTGAN",
    "CGANPCRN",
    "RN",
    "AOTGANDiscriminator",
    "AOTGANNet",
    "CGANPCRNDiscriminator",
    "DeepGIN",
    "DeepGINDiscriminator",
    "DeepGINGenerator",
    "DeepGINPrediction",
    "Discriminator",
    "InpaintingModel",
    "MultiScaleDiscriminator",
    "PConv",
    "PConvUNet",
    "Prediction",
    "RNDiscriminator",
    "RNNet",
    "RegionWise",
    "RegionWiseDiscriminator",
    "RegionWisePrediction",
    "SMPatchGAN",
    "build_discriminator",
    "build_model",
    "export_onnx",
    "key_of",
    "load_published",
]
