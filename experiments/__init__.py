"""One experiment a file: `experiment` is its settings, its docstring what it takes and what it gives."""
