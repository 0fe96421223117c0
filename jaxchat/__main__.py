"""`python -m jaxchat`: the console command `jaxchat`."""

from jaxchat.cli.main import main

if __name__ == "__main__":
    main()
