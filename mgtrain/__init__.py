"""mgtrain trains video classifiers in a fraction of the time with the multigrid method (Wu et al., CVPR 2020).

The Python interface is the names in `__all__`; each is imported when it is first used, so `import mgtrain` is quick.

>>> import mgtrain
>>> recipe = mgtrain.load_recipe("demo_multigrid", ["optim.lr=0.05"])
>>> plan = mgtrain.make_plan(recipe, videos=160)
>>> [str(step.shape) for step in plan][:3], f"{plan[30].lr:.3g}", plan[0].bn_groups
(['128x4x32²', '64x4x45²', '64x4x45²'], '0.136', 8)

`fit(recipe, RunDir("runs/mine"), World())` trains it and returns the final scores. `train_batches`, `at_step`
and related functions bring multigrid into your own training loop. Errors that the user can fix are of the class
`MgtrainError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgtrain.engine.fit import fit
    from mgtrain.engine.loops import at_step, evaluate, loss, make_model, recalibrate, train_batches
    from mgtrain.engine.start import open_data
    from mgtrain.engine.trained import load_trained
    from mgtrain.engine.update.optim import make_optimizer, set_lr
    from mgtrain.errors import MgtrainError
    from mgtrain.grid import Shape
    from mgtrain.models.foreign import group_batchnorm
    from mgtrain.processes.distributed import World
    from mgtrain.recipe import Recipe, load_recipe
    from mgtrain.runs.folder import RunDir
    from mgtrain.schedule import Plan, Step, make_plan
    from mgtrain.schedule.plan import lr

__version__ = "0.1.0"
NAMES = {  # of each module
    "engine.fit": "fit",
    "engine.loops": "at_step evaluate loss make_model recalibrate train_batches",
    "engine.start": "open_data",
    "engine.trained": "load_trained",
    "engine.update.optim": "make_optimizer set_lr",
    "errors": "MgtrainError",
    "grid": "Shape",
    "models.foreign": "group_batchnorm",
    "processes.distributed": "World",
    "recipe": "Recipe load_recipe",
    "runs.folder": "RunDir",
    "schedule": "Plan Step make_plan",
    "schedule.plan": "lr",
}
__all__ = ["MgtrainError", "Plan", "Recipe", "RunDir", "Shape", "Step", "World", "at_step", "evaluate", "fit",
           "group_batchnorm", "load_recipe", "load_trained", "loss", "lr", "make_model", "make_optimizer", "make_plan",
           "open_data", "recalibrate", "set_lr", "train_batches"]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    for module, names in NAMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
