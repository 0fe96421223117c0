"""Models for other programs and from them: names and shapes of weights, Hugging Face's files, model cards."""
