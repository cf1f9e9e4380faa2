"""The optimizer: SGD with Nesterov momentum, no weight decay on normalizations."""

from __future__ import annotations

import torch
from torch import nn

from mgtrain.models.foreign import classifier_of
from mgtrain.recipe import Optim

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """SGD over the model's parameters; each step sets its own learning rate, times a group's `lr_factor`.

    It is the fused one, which leaves everything as it is where its `found_inf` is 1, without a look from the host.
    """
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    undecayed = [p for norm in norms for p in norm.parameters()]
    head = [p for name, p in model.named_parameters() if name.startswith(f"{classifier_of(model)}.")]
    known = {id(p) for p in (*undecayed, *head)}
    decayed = [p for p in model.parameters() if id(p) not in known]
    optimizer = torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": optim.weight_decay, "lr_factor": 1.0},
            {"params": undecayed, "weight_decay": 0.0, "lr_factor": 1.0},
            {"params": head, "weight_decay": optim.weight_decay, "lr_factor": optim.head_lr},
        ],
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        fused=True,
    )
    if optim.momentum:  # the buffers that the first step makes are not filled if its update is left out
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
