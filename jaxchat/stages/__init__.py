"""The stages of an experiment, each a thin script over the layers below."""
