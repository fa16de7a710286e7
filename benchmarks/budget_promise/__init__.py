"""Peak of the process against its budget, in every way in which a process may begin."""
