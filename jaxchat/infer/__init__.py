"""Generation: the batched engine with its KV cache, sampling, the calculator, and loading a trained model."""
