# SPDX-License-Identifier: Apache-2.0
"""Networks made on the meta device, as large ones are, and filled there by the ways that torch has."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_close
from test_training import CONFIG, CRITIC
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_inpaint import models


def filled(net: nn.Module, state: dict[str, Tensor]) -> None:
    net.to_empty(device="cpu")
    net.load_state_dict(state)


def refilled(net: nn.Module, state: dict[str, Tensor]) -> None:
    assigned(net, state)
    filled(net, state)


def assigned(net: nn.Module, state: dict[str, Tensor]) -> None:
    net.load_state_dict(state, assign=True)
    net.to("cpu")


@pytest.mark.parametrize("fill", [filled, assigned, refilled])
@pytest.mark.parametrize(
    "build, key, config",
    [(models.build_model, key, config) for key, config in CONFIG.items()]
    + [(models.build_discriminator, key, config) for key, config in CRITIC.items()],
)
@torch.inference_mode()
def test_network(
    build: Callable[..., nn.Module], key: str, config: dict[str, Any], fill: Callable[..., None], poisoned: None
) -> None:
    net = build(key, **config).eval()
    with torch.device("meta"):
        other = build(key, **config).eval()
    fill(other, copy.deepcopy(net.state_dict()))  # some discriminators move their buffers in each call
    image, mask = torch.rand(1, 3, 64, 64), (torch.rand(1, 1, 64, 64) > 0.3).float()
    for expected, found in zip(tree_leaves(net(image, mask)), tree_leaves(other(image, mask)), strict=True):
        assert_close(found, expected, 1e-6)
