"""The options by which a command is one of several processes that work together."""

from __future__ import annotations

import argparse
import os

from jaxchat.cli.values import whole
from jaxchat.config import Range
from jaxchat.devices.launchers import Cluster, find_cluster


def add_several_processes(parser: argparse.ArgumentParser) -> None:
    """Adds `--coordinator`, `--num-processes` and `--process-id` to a parser."""
    add = parser.add_argument_group(
        "several processes", "Needed only where no launcher sets them: see deploy/README.md."
    ).add_argument
    add("--coordinator", metavar="HOST:PORT", help="Host of process 0, and a free port there.")
    add("--num-processes", metavar="N", type=whole(Range(at_least=1)), help="Number of processes; 1 to work alone.")
    add("--process-id", metavar="I", type=whole(Range(at_least=0)), help="Number of this process, from 0.")


def cluster_of(options: argparse.Namespace, *, alone_if_unsure: bool = False) -> Cluster | None:
    """The cluster of those options or of the environment; arguments and errors as for `find_cluster`."""
    given = options.coordinator, options.num_processes, options.process_id
    return find_cluster(os.environ, *given, alone_if_unsure=alone_if_unsure)
