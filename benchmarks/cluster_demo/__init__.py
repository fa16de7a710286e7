"""`make cluster-demo`: three nodes on this machine run BERT-Large and SmolLM2 together."""
