"""The GPT: modules, and the pure functions over its parameters that everything else calls."""
