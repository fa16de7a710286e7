"""What runs in processes of their own; those for other engines in environments that lack pipeload's packages."""
