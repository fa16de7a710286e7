"""An idle server, and its first answer."""
