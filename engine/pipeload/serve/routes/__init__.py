"""The routes: each reads a body, calls a model, and answers with a body.

```
desk        what all routes share
state       /v1/models, /health, /ready, /metrics
page        / and its files
machine     /machine
inputs      texts and token ids in the forms in which clients send them
embeddings  /v1/embeddings, /embed
tokens      tokens as text, with their probabilities
chat        /v1/chat/completions
completions /v1/completions
responses   /v1/responses
ranking     /v1/rerank, /rerank
classify    /v1/classify
tokenize    /tokenize
```
"""
