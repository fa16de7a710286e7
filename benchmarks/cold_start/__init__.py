"""Cold start: seconds until the first answer, nothing in memory."""
