"""Runs an experiment: `python launch.py --experiment=quickstart`. The command itself is jaxchat/cli/launch.py."""

from jaxchat import stopping

if __name__ == "__main__":
    stopping.begin()  # first: what follows takes longer to import
    from jaxchat.cli.exits import leave
    from jaxchat.cli.launch import main

    leave(main())
