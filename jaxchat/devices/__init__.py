"""Devices, processes, launchers, and facts of the machine."""
