"""Questions that are answered by measuring: one folder a question, with README.md, main.py and results/."""
