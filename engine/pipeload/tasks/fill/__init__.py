"""A text with a gap -> the tokens that may fill it: the module `fill_mask`."""
