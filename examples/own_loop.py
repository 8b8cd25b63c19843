# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own: networks, losses and masks are ordinary PyTorch.

    python examples/own_loop.py --steps 200
    python examples/own_loop.py --steps 200 --fabric    # on Lightning Fabric: pip install lightning-fabric

Models and layers are nn.Modules with ordinary parameters, so Fabric's `setup` takes them as they are, and accelerate's
`prepare` would; for region normalization over several processes set `process_group` of its layers, too.
"""

import argparse
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fused_inpaint import losses
from fused_inpaint.masks import Masks
from fused_inpaint.models import build_discriminator, build_model


def pictures(count: int, side: int) -> Tensor:
    """(N, 3, side, side) in [0, 1]: stands for a data set."""
    return F.interpolate(torch.rand(count, 3, 6, 6), (side, side), mode="bicubic", align_corners=False).clamp(0, 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--fabric", action="store_true", help="device, precision and backward by Lightning Fabric")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model: nn.Module = build_model("aot_gan", blocks=2, width=16).to(device).train()
    critic: nn.Module = build_discriminator("aot_gan", width=16).to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-4, (0.5, 0.999))
    critic_optimiser = torch.optim.Adam(critic.parameters(), 1e-4, (0.5, 0.999))
    autocast, backward = partial(torch.autocast, device, torch.bfloat16, enabled=arguments.amp), Tensor.backward
    if arguments.fabric:
        try:
            from lightning_fabric import Fabric
        except ImportError:
            raise SystemExit("--fabric needs Lightning Fabric: pip install lightning-fabric") from None

        fabric = Fabric(accelerator=device, devices=1, precision="bf16-mixed" if arguments.amp else "32-true")
        model, optimiser = fabric.setup(model, optimiser)
        critic, critic_optimiser = fabric.setup(critic, critic_optimiser)
        autocast, backward = fabric.autocast, fabric.backward
    masks = iter(DataLoader(Masks("aot_gan", arguments.side, seed=0), arguments.batch))

    begun = time.perf_counter()
    for step in range(arguments.steps):
        image = pictures(arguments.batch, arguments.side).to(device)
        mask = next(masks).to(device)  # (N, 1, H, W) uint8, 1 = valid
        with autocast():
            output = model(image, mask).image
            completed = losses.composite(output, image, mask)
            # The generator's gradient goes through the critic, whose own it must not leave behind.
            critic.requires_grad_(False)
            l1, adversarial = F.l1_loss(output, image), losses.generator_soft_mask(critic(completed, mask), mask)
            # VGG's terms: losses.VGG(19, layers, weights), losses.perceptual, losses.style.
            loss = l1 + 0.01 * adversarial
        optimiser.zero_grad()
        backward(loss)
        optimiser.step()

        critic.requires_grad_(True)
        with autocast():
            real, fake = critic(image, mask), critic(completed.detach(), mask)
            critic_loss = losses.discriminator_soft_mask(real, fake, mask)
        critic_optimiser.zero_grad()
        backward(critic_loss)
        critic_optimiser.step()
        if step == 0 or (step + 1) % 20 == 0 or step + 1 == arguments.steps:
            print(f"step {step + 1}: l1 {l1.item():.3f}  generator {loss.item():.3f}  critic {critic_loss.item():.3f}")
    print(f"{(time.perf_counter() - begun) / max(arguments.steps, 1):.3f} s a step")


if __name__ == "__main__":
    main()
