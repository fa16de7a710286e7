"""`make demo`: two real models, streamed under a cap below their weights, beside single-session ONNX Runtime."""
