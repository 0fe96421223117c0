"""Runs an experiment: `python launch.py --experiment=quickstart`. The command itself is jaxchat/cli/launch.py."""

from jaxchat.cli.exits import leave
from jaxchat.cli.launch import main

if __name__ == "__main__":
    leave(main())
