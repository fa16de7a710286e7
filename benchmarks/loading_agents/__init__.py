"""Loading agents: pipeload with 1, 2, 4 and 8, beside the usual pipelines."""
