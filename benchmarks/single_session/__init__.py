"""Single session: what pipeload costs when the whole model fits."""
