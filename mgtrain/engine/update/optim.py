"""The optimizer, SGD or AdamW over groups of parameters with their own settings."""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from mgtrain.errors import UsageError
from mgtrain.models.foreign import classifier_of
from mgtrain.models.recompute import blocks
from mgtrain.models.weights.load import is_ours
from mgtrain.models.weights.naming import OWN, STAGES
from mgtrain.recipe import Optim
from mgtrain.schedule.plan import Step, lr

NORMS = (
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm
)  # fmt: skip
# Parts of the names of parameters that AdamW does not decay.
TABLES = re.compile(r"(^|[._])(pos|positions?|positional|cls_token|class_token)([._]|$)")


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The recipe's optimizer; a step sets each group's learning rate to its own times the group's `lr_factor`.

    It is fused: it skips an update if `found_inf` is 1 on the device, without waiting for the GPU. Raises `UsageError`
    if `optim.layer_decay` is below 1 and the network repeats no block.
    """
    parameters = dict(model.named_parameters())
    undecayed = undecayed_names(model, optim)
    depths, last = layers(model) if optim.layer_decay < 1 else (dict.fromkeys(parameters, 0), 0)
    head, groups = f"{classifier_of(model)}.", dict[Any, dict[str, Any]]()
    for name, parameter in parameters.items():
        decay = 0.0 if name in undecayed else optim.weight_decay
        factor = optim.layer_decay ** (last - depths[name]) * (optim.head_lr if name.startswith(head) else 1.0)
        kind = (name.startswith(head), depths[name], name in undecayed)
        groups.setdefault(kind, {"params": [], "weight_decay": decay, "lr_factor": factor})["params"].append(parameter)
    optimizer: torch.optim.Optimizer
    of_all: dict[str, Any] = {"params": list(groups.values()), "lr": optim.lr, "fused": True}
    if optim.name == "adamw":
        optimizer, buffers = _AdamW(**of_all, betas=optim.betas, eps=optim.eps), ["exp_avg", "exp_avg_sq"]
    else:
        optimizer = _SGD(**of_all, momentum=optim.momentum, nesterov=optim.nesterov)
        buffers = ["momentum_buffer"] if optim.momentum else []
    for parameter in parameters.values():  # torch leaves new buffers uninitialized if the first update is skipped
        if optim.name == "adamw":
            optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in buffers:
            optimizer.state[parameter][name] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, step: Step) -> None:
    """Set the learning rate of a step, times each parameter group's `lr_factor` (1 if it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr(step) * group.get("lr_factor", 1.0)


def undecayed_names(model: nn.Module, optim: Optim) -> set[str]:
    """The names of the parameters without weight decay: those of normalizations.

    For AdamW also all vectors (biases, scales), tables of positions and tokens by their names, and the names that the
    network's `no_weight_decay()` returns, if it has one as timm's networks do.
    """
    names = {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters()
    }
    if optim.name == "adamw":
        named = getattr(model, "no_weight_decay", set)
        names |= {name for name, p in model.named_parameters() if p.ndim <= 1 or TABLES.search(name)} | set(named())
    return names


def layers(model: nn.Module) -> tuple[dict[str, int], int]:
    """Each parameter's layer, and the number of the last one, to which the classifier belongs.

    In the order of definition, layer 0 is everything before the first block that the network repeats; each block is a
    layer with what follows it up to the next one; what follows the last block is the last layer. The layers of SlowFast
    and I3D are their stages, because their pathways are defined one by one.
    """
    names = [name for name, _ in model.named_parameters()]
    if is_ours(model):
        stages = {name: OWN.common(name).split(".")[1] for name in names}
        depths = {name: STAGES.index(stage) if stage in STAGES else len(STAGES) for name, stage in stages.items()}
        return depths, len(STAGES)
    repeated = {id(block) for block in blocks(model)}
    prefixes = [f"{name}." for name, module in model.named_modules() if id(module) in repeated]
    prefixes = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)]  # not those of pooling
    if not prefixes:
        raise UsageError("optim.layer_decay: the network repeats no block that could be a layer; set it to 1")
    found, seen = {}, 0
    for name in names:
        seen = next((n for n, prefix in enumerate(prefixes, 1) if name.startswith(prefix)), seen)
        found[name] = seen
    end = max(n for n, name in enumerate(names) if name.startswith(prefixes[-1]))
    return {**found, **dict.fromkeys(names[end + 1 :], len(prefixes) + 1)}, len(prefixes) + 1


class _InPlace(torch.optim.Optimizer):
    """Fused steps that update channels_last parameters on a CPU in place, while torch copies them twice."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = {"grad_scale": getattr(self, "grad_scale", None), "found_inf": getattr(self, "found_inf", None)}
        for group in self.param_groups:
            self._update(group, [p for p in group["params"] if p.grad is not None], scaling)
        return loss

    @abstractmethod
    def _update(self, group: dict[str, Any], params: Sequence[Any], scaling: dict[str, Any]) -> None:
        """Update a group's parameters in place from their gradients."""


class _SGD(_InPlace, torch.optim.SGD):
    def _update(self, group: dict[str, Any], params: Sequence[Any], scaling: dict[str, Any]) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        sgd(
            [_flat(p, p) for p in params],
            [_flat(p.grad, p) for p in params],
            [b if b is None else _flat(b, p) for b, p in zip(buffers, params, strict=True)],
            **{key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")},
            fused=True,
            **scaling,
        )


class _AdamW(_InPlace, torch.optim.AdamW):
    def _update(self, group: dict[str, Any], params: Sequence[Any], scaling: dict[str, Any]) -> None:
        adamw(
            [_flat(p, p) for p in params],
            [_flat(p.grad, p) for p in params],
            [_flat(self.state[p]["exp_avg"], p) for p in params],
            [_flat(self.state[p]["exp_avg_sq"], p) for p in params],
            [],
            [self.state[p]["step"] for p in params],
            **{key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize")},
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            fused=True,
            **scaling,
        )


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """`x` with its dimensions sorted by the strides of `like`: contiguous if both have the same memory format."""
    return x.permute(sorted(range(like.dim()), key=like.stride, reverse=True))
