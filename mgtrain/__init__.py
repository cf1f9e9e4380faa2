"""mgtrain trains video classifiers several times faster with the multigrid method (Wu et al., CVPR 2020).

The Python interface is the names in `__all__`; each is imported when it is first used, so `import mgtrain` is quick.

>>> import mgtrain
>>> recipe = mgtrain.load_recipe("demo_multigrid", ["optim.lr=0.05"])
>>> plan = mgtrain.make_plan(recipe, videos=480)
>>> [str(shape) for shape in plan.phases[0].shapes]
['128x4x40²', '64x4x57²', '64x4x57²']

`fit(recipe, RunDir(Path("runs/mine")), World())` trains it and returns the final scores; `load_trained(file, None, [],
World())` loads the network of a checkpoint. Errors that the user can fix are of the class `MgtrainError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgtrain.engine.fit import fit
    from mgtrain.engine.trained import load_trained
    from mgtrain.errors import MgtrainError
    from mgtrain.processes.distributed import World
    from mgtrain.recipe import load_recipe
    from mgtrain.runs.folder import RunDir
    from mgtrain.schedule import make_plan

__version__ = "0.1.0"
__all__ = ["MgtrainError", "RunDir", "World", "fit", "load_recipe", "load_trained", "make_plan"]

HOME = {
    "MgtrainError": "errors",
    "RunDir": "runs.folder",
    "World": "processes.distributed",
    "fit": "engine.fit",
    "load_recipe": "recipe",
    "load_trained": "engine.trained",
    "make_plan": "schedule",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOME[name]}"), name)
