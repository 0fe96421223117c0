"""The console command `jaxchat`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxchat.cli.data import add_data
from jaxchat.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxchat ...` and returns its exit code: 0, 2 for bad input, 130 when it was interrupted."""
    try:
        parser = _parser()
        arguments, rest = parser.parse_known_args(argv)
        if "overrides" in arguments:
            arguments.overrides = rest
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return arguments.command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone; nor shall the interpreter's own flush at exit complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from jaxchat.storage import first_line, of_the_cloud  # slow to import

        if not of_the_cloud(error):
            raise
        print(f"error: the storage failed ({first_line(error)}); try again", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxchat", description="Talk to a model that jaxchat has trained; compare tokenizers; "
                     "download data; find learning rates; profile training.")  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chat = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    chat.add_argument("--run", required=True, metavar="DIR", help="the run's directory")
    chat.add_argument("--stage", help="pretrain, midtrain, sft or rl; the last finished one if not given")
    chat.add_argument("--step", metavar="N", help="an earlier step of the stage that was kept, or best")
    chat.add_argument("-p", "--prompt", metavar="TEXT", help="print the answer to TEXT and leave")
    chat.add_argument("--temperature", type=float, default=0.6, help="0 takes the likeliest token")
    chat.add_argument("--top-k", type=int, default=50, help="draw from the K likeliest tokens")
    chat.add_argument("--seed", type=int, help="repeats a conversation exactly; fresh if not given")
    chat.add_argument("--max-tokens", type=int, default=256, help="the longest answer")
    chat.set_defaults(command=_chat)
    tokenizer = commands.add_parser("tokenizer", help="how well a tokenizer compresses, against others")
    tokenizer_commands = tokenizer.add_subparsers(metavar="COMMAND", required=True)
    evaluate = tokenizer_commands.add_parser(
        "eval",
        help="bytes per token on several kinds of text",
        description="Bytes per token on news, code, math, other scripts, and the training text; more are better. "
        "PATH and FILE: a run directory, a folder with a tokenizer.json, or a .json or .tiktoken file.",
    )
    evaluate.add_argument("path", metavar="PATH", help="the tokenizer")
    evaluate.add_argument("--against", nargs="+", default=[], metavar="FILE", help="others to compare it with")
    evaluate.add_argument("--text", metavar="TEXT", help="a folder or file of text; a run's own text if not given")
    evaluate.add_argument("--pattern", metavar="REGEX", help="the split pattern of .tiktoken files of unknown names")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(command=_evaluate_tokenizer)
    add_data(commands)
    _add_lr_range(commands)
    _add_profile(commands)
    return parser


def _add_lr_range(commands) -> None:
    lr_range = commands.add_parser(
        "lr-range",
        help="learning-rate range test: a suggested rate for each parameter group",
        description="Raises the learning rate of one parameter group after the other, each time from a fresh model, "
        "until the loss suffers, and suggests a rate for each. Leaves lr_range.png and lr_range.json in the run's "
        "directory, and nothing there is changed.",
        epilog="Fields of the experiment are overridden as for launch.py, such as --model.depth=6; all of them: "
        "python launch.py --experiment=NAME --help",
        allow_abbrev=False,
    )
    add = lr_range.add_argument
    add("--experiment", metavar="NAME", help="one of experiments/")
    add("--run-dir", metavar="DIR", help="where the run lives (default runs/NAME)")
    add("--data", metavar="DIR", help="your text, as for launch.py")
    add("--steps", type=int, default=200, metavar="N", help="optimizer steps a group (default 200)")
    add("--min", type=float, metavar="RATE", help="the first rate (default: the configured one / 1000)")
    add("--max", type=float, metavar="RATE", help="the last rate (default: the configured one x 1000)")
    add("--group", choices=("matrix", "embedding", "head", "all"), default="all", help="which to test (default all)")
    _with_overrides(lr_range, _lr_range)


def _add_profile(commands) -> None:
    profile = commands.add_parser(
        "profile",
        help="where a training step's time goes",
        description="Runs a few pretraining steps of an experiment on random tokens under the profiler. Prints the "
        "time of each part of the model, of communication, copies and idleness, and the longest kernels; keeps the "
        "trace.",
        epilog="Fields of the experiment are overridden as for launch.py, such as --model.depth=6. On a GPU, command "
        "buffers are off while profiling: kernels inside do not say which instruction they run.",
        allow_abbrev=False,
    )
    add = profile.add_argument
    add("--experiment", metavar="NAME", help="one of experiments/")
    add("--steps", type=int, default=5, metavar="N", help="optimizer steps in the trace (default 5)")
    add("--trace", metavar="DIR", help="where the trace is kept (default runs/profiles/NAME)")
    _with_overrides(profile, _profile)


def _with_overrides(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> None:
    """Lets fields of an experiment follow the parser's own options, whose names are for hints about misspelt ones."""
    options = [name for action in parser._actions for name in action.option_strings]
    parser.set_defaults(command=command, overrides=(), options=options)


def _chat(arguments: argparse.Namespace) -> int:
    from jaxchat.ops.programs import keep_compiled  # imports JAX: --help and bad arguments need not wait for it
    from jaxchat.serve.terminal import chat

    keep_compiled()
    options = {name: getattr(arguments, name) for name in ("step", "temperature", "top_k", "seed", "max_tokens")}
    return chat(arguments.run, arguments.stage, arguments.prompt, **options)


def _evaluate_tokenizer(arguments: argparse.Namespace) -> int:
    from jaxchat.cli.tokenizer import evaluate

    options = {"pattern": arguments.pattern, "as_json": arguments.json}
    return evaluate(arguments.path, arguments.against, arguments.text, **options)


def _lr_range(arguments: argparse.Namespace) -> int:
    launch = _launcher()
    experiment = launch.configure(arguments.experiment, arguments.overrides, arguments.data, arguments.options)
    from jaxchat.analysis.lr_range import GROUPS, run
    from jaxchat.ops.programs import keep_compiled
    from jaxchat.stages.pipeline import check_possible
    from jaxchat.stages.run import Run

    keep_compiled()
    check_possible(experiment)
    opened = Run(experiment, arguments.run_dir or f"runs/{experiment.name}", keep_config=True)
    groups = GROUPS if arguments.group == "all" else (arguments.group,)
    run(opened, arguments.steps, arguments.min, arguments.max, groups)
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    launch = _launcher()
    experiment = launch.configure(arguments.experiment, arguments.overrides, None, arguments.options)
    from jaxchat.analysis.profile import profile
    from jaxchat.devices.mesh import set_xla_flags

    set_xla_flags("--xla_gpu_enable_command_buffer=")  # in command buffers the profiler does not see kernels
    directory = Path(arguments.trace or f"runs/profiles/{experiment.name}")
    profile(experiment, steps=arguments.steps, directory=directory)
    return 0


def _launcher():
    """The module launch.py, which is not installed: the experiments beside it are files for the user to change.

    Raises:
      UserError: the working directory is not a checkout, nor is this package part of one.
    """
    for folder in (Path(__file__).parents[2], Path.cwd()):
        if all((folder / name).exists() for name in ("launch.py", "experiments", "jaxchat")):
            sys.path.insert(0, str(folder))
            return importlib.import_module("launch")
    raise UserError("the experiments are not here; start this in the folder that has launch.py and experiments/")


if __name__ == "__main__":
    sys.exit(main())
