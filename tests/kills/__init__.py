"""Nodes of a cluster that end at random moments of random calls."""
