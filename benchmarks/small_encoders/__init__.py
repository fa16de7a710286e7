"""Encoders of 8 bits in little memory, beside a session that holds the float32 model."""
