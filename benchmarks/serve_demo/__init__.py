"""`make serve-demo`: an embedder and a chat model on one port, in one memory cgroup of 300 MB."""
