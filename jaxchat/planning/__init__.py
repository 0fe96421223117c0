"""Sizes of an experiment that follow from its text, and from the time that it may take."""
