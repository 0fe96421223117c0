"""The commands: arguments, exit codes and signals."""
