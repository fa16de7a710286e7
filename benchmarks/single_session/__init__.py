"""Single session: the cost of pipeload when the whole model fits."""
