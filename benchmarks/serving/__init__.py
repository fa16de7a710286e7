"""`pipeload serve` under load, beside other servers of the same models."""
