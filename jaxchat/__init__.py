"""jaxchat: a small ChatGPT trained from nothing, in JAX."""

__version__ = "0.1.0"
