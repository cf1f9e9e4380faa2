"""The command line.

Each command calls the rooms below and prints what they return: results to stdout, messages to stderr. Nothing is
computed here. Only the commands that need torch import it, so the others answer at once.
"""

import sys

if sys.platform == "win32":
    sys.exit("mgtrain: this is Windows, and mgtrain needs Linux; run it in WSL 2")

import io
import os
import traceback
from collections.abc import Callable
from typing import Annotated

import typer
from typer import Option

from mgtrain import __version__
from mgtrain.cli.bench import bench_app, doctor
from mgtrain.cli.checkpoints import ckpt_app
from mgtrain.cli.compare import compare, report, watch
from mgtrain.cli.data import data_app
from mgtrain.cli.fit import fit
from mgtrain.cli.init import init
from mgtrain.cli.plan import plan
from mgtrain.cli.recipes import recipes_app
from mgtrain.cli.study import study
from mgtrain.cli.trained import evaluate, export, predict
from mgtrain.cli.weights import weights_app
from mgtrain.console import note, out
from mgtrain.data.formats.reading import is_video
from mgtrain.errors import MgtrainError, lack_of

INTERRUPTED = 130  # exit code

app = typer.Typer(
    name="mgtrain",
    help="Train video classifiers in a fraction of the time with the multigrid method (Wu et al., CVPR 2020).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init, "fit": fit, "eval": evaluate, "predict": predict, "export": export, "report": report,
    "watch": watch, "doctor": doctor, "compare": compare, "study": study, "plan": plan,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name)(command)
for group in (recipes_app, data_app, bench_app, ckpt_app, weights_app):
    app.add_typer(group)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. A user's mistake ends in one line and the documented exit code, never in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: the terminal may not encode all names
    os.environ["PYTHONSAFEPATH"] = "1"  # a Python started from here does not import from the current folder
    try:
        code = typer.main.get_command(app).main(prog_name="mgtrain", standalone_mode=False)
        if code == INTERRUPTED:  # Ctrl-C, caught by typer
            raise KeyboardInterrupt
        sys.stdout.flush()
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer does not export it; its message is the help
            note(error.format_message())
            sys.exit(2)
        context = getattr(error, "ctx", None)
        advice = f"see `{context.command_path if context else 'mgtrain'} --help`"
        for word in reversed(sys.argv[1:]):  # a file such as a video named by its YouTube id
            if word.startswith("-") and (is_video(word) or os.path.exists(word)):
                advice = f"write ./{word}, or -- before the names, for a file whose name starts with a dash"
        _say(f"{error.format_message().rstrip('.')}; {advice}")
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        _say("interrupted; run the same command again, `mgtrain fit` with --resume")
        code = INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise  # not a broken pipe that typer has turned into an exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python does not write again when it exits
        code = 141
    except Exception as error:
        if known := error if isinstance(error, MgtrainError) else lack_of(error):
            _say(str(known))
            code = known.exit_code
        elif isinstance(error, OSError) and error.filename is not None:
            _say(f"{error.filename}: {error.strerror}; give another path, correct its permissions or free disk space")
            code = 2
        else:
            note(traceback.format_exc().rstrip())
            _say(f"unexpected {type(error).__name__}, a bug in mgtrain; please report it with the lines above")
            code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str) -> None:
    """Print the one line with which a command fails."""
    if "WORLD_SIZE" in os.environ:  # one of several ranks
        from mgtrain.processes.distributed import says_first

        if not says_first(message):
            return
    note("mgtrain: " + message.replace("\n", r"\n"), "red")
