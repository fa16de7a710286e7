"""Text generation: beside other engines, with guessed tokens, for several callers, and over a long text."""
