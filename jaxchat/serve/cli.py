"""The console command `jaxchat`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from jaxchat.config import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxchat ...` and returns its exit code: 0, 2 for bad input, 130 when it was interrupted."""
    try:
        arguments = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxchat", description="Talk to a model that jaxchat has trained; compare tokenizers.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chat = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    chat.add_argument("--run", required=True, metavar="DIR", help="the run's directory")
    chat.add_argument("--stage", help="pretrain, midtrain, sft or rl; the last finished one if not given")
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
    return parser


def _chat(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxchat/compiled"))
    from jaxchat.serve.terminal import chat  # imports JAX: --help and bad arguments need not wait for it

    options = {name: getattr(arguments, name) for name in ("temperature", "top_k", "seed", "max_tokens")}
    return chat(arguments.run, arguments.stage, arguments.prompt, **options)


def _evaluate_tokenizer(arguments: argparse.Namespace) -> int:
    from jaxchat.serve.tokenizer_eval import evaluate

    options = {"pattern": arguments.pattern, "as_json": arguments.json}
    return evaluate(arguments.path, arguments.against, arguments.text, **options)


if __name__ == "__main__":
    sys.exit(main())
