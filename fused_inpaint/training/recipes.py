# SPDX-License-Identifier: Apache-2.0
"""How each paper trains its network: loss terms, their weights, optimisers and schedule (masks: fused_inpaint.masks).

Sums that a paper takes over a batch of one size are kept as such where its weights belong to them. Where paper and
published code differ, the code is followed and the difference named.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import losses

Terms = dict[str, Tensor]
_FIRST_OF_BLOCK = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


class Batch(NamedTuple):
    """What the loss terms of a step are made of."""

    image: Tensor  # (N, 3, H, W) in [0, 1]: the truth
    mask: Tensor  # (N, 1, H, W), 1 = valid
    prediction: Any  # of the model
    features: Callable[[Tensor], list[Tensor]] | None  # VGG's, by the recipe's layers; None without weights
    score: Callable[[Tensor], Any] | None  # the discriminator's of an image; None while it takes no part

    def completed(self, output: Tensor) -> Tensor:
        return losses.composite(output, self.image, self.mask)


@dataclass(frozen=True)
class Stage:
    """A part of the training; `share` of all steps."""

    share: float
    rate: float  # learning rate of the generator, as a factor of the recipe's
    decay: bool = False  # linearly to 0
    adversarial: bool = True
    frozen_encoder_norm: bool = False


@dataclass(frozen=True)
class Recipe:
    """A paper's training.

    `generator(batch)` and `discriminator(batch)` give the named terms, `weights` their factors (1 where none is named);
    `without_vgg` has those that another takes the place of when perceptual and style terms are left out.
    """

    key: str
    size: int
    batch: int
    rate: float
    generator: Callable[[Batch], Terms]
    weights: dict[str, float]
    stages: tuple[Stage, ...]
    without_vgg: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    vgg: tuple[int, tuple[str, ...]] = (16, ("pool1", "pool2", "pool3"))
    discriminator: Callable[[Batch], Terms] | None = None
    discriminator_rate: float = 0.0
    model: dict[str, Any] = field(default_factory=dict)  # configuration of the network
    critic: dict[str, Any] = field(default_factory=dict)  # configuration of the discriminator

    def at(self, step: int, steps: int) -> tuple[Stage, float]:
        """(the stage of a step, the generator's learning rate)"""
        begin = 0.0
        for stage in self.stages:
            end = begin + stage.share * steps
            if step < round(end) or stage is self.stages[-1]:
                left = (end - step) / max(end - begin, 1.0) if stage.decay else 1.0
                return stage, self.rate * stage.rate * max(left, 0.0)
            begin = end
        raise AssertionError("a recipe has stages")


def _perceptual_and_style(batch: Batch, outputs: list[Tensor]) -> Terms:
    if batch.features is None:
        return {}
    target = [f.detach() for f in batch.features(batch.image)]
    made = [batch.features(output) for output in outputs]
    return {
        "perceptual": sum(losses.perceptual(f, target) for f in made),  # type: ignore[dict-item]
        "style": sum(losses.style(f, target) for f in made),  # type: ignore[dict-item]
    }


def _pconv(batch: Batch) -> Terms:
    """Liu et al. 2018, eq. 3 to 7."""
    output = batch.prediction.image
    completed = batch.completed(output)
    valid, hole = losses.valid_and_hole_l1(output, batch.image, batch.mask)
    smooth = losses.total_variation_of_hole(completed, batch.mask)
    return {"valid": valid, "hole": hole, "tv": smooth, **_perceptual_and_style(batch, [output, completed])}


_PCONV = {"valid": 1.0, "hole": 6.0, "perceptual": 0.05, "style": 120.0, "tv": 0.1}


def _cgan(batch: Batch) -> Terms:
    """Shi et al.: the losses of partial convolutions, and the generator's of a conditional GAN."""
    terms = _pconv(batch)
    if batch.score is not None:
        terms["adversarial"] = losses.generator_bce(batch.score(batch.prediction.image))
    return terms


def _cgan_discriminator(batch: Batch) -> Terms:
    assert batch.score is not None
    real, fake = batch.score(batch.image), batch.score(batch.prediction.image)
    return {"discriminator": losses.discriminator_bce(real, fake)}


def _region_wise(batch: Batch) -> Terms:
    """Ma et al. 2022, eq. 2 to 7. Sums over the batch, of values in [-1, 1]; the features are those of the image at its
    own size, where the published code makes it 224 x 224 first."""
    first, second = batch.prediction
    terms: Terms = {"l1": 2 * sum((output - batch.image).abs().sum() for output in (first, second))}
    if batch.features is not None:
        target = [f.detach() for f in batch.features(batch.image)]
        terms["correlation"] = losses.correlation(batch.features(batch.completed(first))[1], target[1])
        terms["style"] = losses.style(batch.features(batch.completed(second)), target, "sum")
    if batch.score is not None:
        scores = [batch.score(output) for output in (first, second)]
        terms["adversarial"] = losses.generator_region_wise(scores, batch.mask)
    return terms


def _region_wise_discriminator(batch: Batch) -> Terms:
    assert batch.score is not None
    fakes = [batch.score(output) for output in batch.prediction]
    return {"discriminator": losses.discriminator_region_wise(batch.score(batch.image), fakes, batch.mask)}


def _deepgin(batch: Batch) -> Terms:
    """Li et al. 2020, eq. 1 to 8."""
    prediction = batch.prediction
    completed = batch.completed(prediction.image)
    small, small_mask = F.interpolate(batch.image, scale_factor=0.25, mode="area"), _quarter(batch.mask)
    terms: Terms = {"valid": batch.image.new_zeros(()), "hole": batch.image.new_zeros(())}
    for output, target, mask in (
        (prediction.coarse, batch.image, batch.mask),
        (prediction.image, batch.image, batch.mask),
        (prediction.low_resolution, small, small_mask),
    ):
        if output is None:
            continue
        valid, hole = losses.valid_and_hole_l1(output, target, mask)
        terms["valid"], terms["hole"] = terms["valid"] + valid, terms["hole"] + hole
    if batch.score is not None:
        terms["adversarial"] = losses.generator_hinge(batch.score(completed))
        terms["tv"] = losses.total_variation(completed, power=2)
        terms |= _perceptual_and_style(batch, [prediction.image, completed])
    return terms


def _quarter(mask: Tensor) -> Tensor:
    """Valid where all of it is."""
    return (F.interpolate(mask.float(), scale_factor=0.25, mode="area") > 0.999).to(mask.dtype)


def _deepgin_discriminator(batch: Batch) -> Terms:
    assert batch.score is not None
    real, fake = batch.score(batch.image), batch.score(batch.completed(batch.prediction.image))
    return {"discriminator": losses.discriminator_hinge(real, fake)}


def _aot(batch: Batch) -> Terms:
    """Zeng et al. 2021, eq. 4 to 8."""
    output = batch.prediction.image
    completed = batch.completed(output)
    terms: Terms = {"l1": F.l1_loss(output, batch.image)}
    if batch.features is not None:
        made, target = batch.features(output), [f.detach() for f in batch.features(batch.image)]
        first = len(_FIRST_OF_BLOCK)
        terms["perceptual"] = losses.perceptual(made[:first], target[:first])
        terms["style"] = losses.style(made[first:], target[first:])
    if batch.score is not None:
        terms["adversarial"] = losses.generator_soft_mask(batch.score(completed), batch.mask)
    return terms


def _aot_discriminator(batch: Batch) -> Terms:
    assert batch.score is not None
    real, fake = batch.score(batch.image), batch.score(batch.completed(batch.prediction.image))
    return {"discriminator": losses.discriminator_soft_mask(real, fake, batch.mask)}


RECIPES = {
    recipe.key: recipe
    for recipe in (
        Recipe(
            "pconv",
            size=512,
            batch=6,
            rate=2e-4,
            generator=_pconv,
            weights=_PCONV,
            # How long each is, the paper does not say.
            stages=(Stage(0.8, 1.0), Stage(0.2, 0.25, frozen_encoder_norm=True)),
        ),
        Recipe(
            "cgan_pc_rn",
            size=256,
            batch=16,
            rate=2e-4,
            generator=_cgan,
            weights=_PCONV,
            # 1 is little beside the perceptual and style terms, and nearly all beside L1 alone: the network unlearns.
            without_vgg={"adversarial": 0.003},
            stages=(Stage(1.0, 1.0),),
            discriminator=_cgan_discriminator,
            discriminator_rate=2e-4,
            # What Yu et al. 2020 write. By their code ("batch") a network is trained on statistics of a batch that a
            # single picture does not have: 2.7 dB less in the first 300 steps of benchmarks/learning.py.
            model={"stats": "instance"},
        ),
        Recipe(
            "region_wise",
            size=256,
            batch=8,
            rate=1e-4,
            betas=(0.5, 0.9),
            generator=_region_wise,
            weights={"correlation": 1e-5, "style": 1e-3},
            # 20 epochs without the discriminator, 9 with it.
            stages=(Stage(20 / 29, 1.0, adversarial=False), Stage(9 / 29, 1.0)),
            discriminator=_region_wise_discriminator,
            discriminator_rate=1e-4,
        ),
        Recipe(
            "deepgin",
            size=256,
            batch=4,
            rate=1e-4,
            betas=(0.5, 0.999),
            generator=_deepgin,
            weights={"valid": 1.0, "hole": 5.0, "adversarial": 0.001, "perceptual": 0.05, "style": 80.0, "tv": 0.2},
            # 10 epochs of L1 alone, 10 with everything, 90 of decay.
            stages=(Stage(10 / 110, 1.0, adversarial=False), Stage(10 / 110, 1.0), Stage(90 / 110, 1.0, decay=True)),
            vgg=(19, _FIRST_OF_BLOCK),
            discriminator=_deepgin_discriminator,
            discriminator_rate=4e-4,
        ),
        Recipe(
            "aot_gan",
            size=512,
            batch=8,
            rate=1e-4,
            betas=(0.5, 0.999),
            generator=_aot,
            weights={"l1": 1.0, "perceptual": 0.1, "style": 250.0, "adversarial": 0.01},
            stages=(Stage(1.0, 1.0),),
            vgg=(19, (*_FIRST_OF_BLOCK, "relu2_2", "relu3_4", "relu4_4", "relu5_2")),
            discriminator=_aot_discriminator,
            discriminator_rate=1e-4,
        ),
    )
}


def recipe_of(key: str, **changes: Any) -> Recipe:
    """The recipe of a network, with fields changed.

    >>> from fused_inpaint.training.recipes import recipe_of
    >>> recipe_of("pconv", size=64).size
    64
    """
    if key not in RECIPES:
        raise ValueError(f"train: key must be one of {', '.join(RECIPES)}, got {key}")
    return replace(RECIPES[key], **changes)
