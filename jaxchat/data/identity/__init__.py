"""Who the model is: an identity in a few lines of text, and the conversations that are made from it."""
