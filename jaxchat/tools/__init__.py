"""What a model may call: the calculator, and Python in a limited process."""
