"""One module for each subcommand, with a function of the same name."""
