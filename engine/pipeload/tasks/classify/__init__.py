"""Texts and images -> labels, tokens -> entities.

```
labels      scores -> labels
entities    labels of tokens -> spans of the text
logits      texts and pairs -> logits
classify    from inputs to answers
zero_shot   labels that the caller names, by a model of entailment
rerank      documents in the order in which they answer a query
```
"""
