"""One module a subcommand, each with a function of the same name."""
