"""The optimizer: SGD with Nesterov momentum, no weight decay on normalizations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

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
    optimizer = _SGD(
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


class _SGD(torch.optim.SGD):
    """Fused SGD that on a CPU takes parameters in channels_last as they lie, where torch copies them to and fro."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            super().step(closure)
            return
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            buffers = [self.state[p].get("momentum_buffer") for p in params]
            sgd(
                [_flat(p, p) for p in params],
                [_flat(p.grad, p) for p in params],
                [b if b is None else _flat(b, p) for b, p in zip(buffers, params, strict=True)],
                **{key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")},
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """The numbers of `x` in the order in which those of `like` lie: a view where theirs lie so, too."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    return x.permute(order)
