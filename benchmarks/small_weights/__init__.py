"""Small weights: what 16 bits buy, with the same answers."""
