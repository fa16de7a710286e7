"""One shard: optimised, sampled, described.

```
fuse           a shard optimised offline by onnxruntime
alignment      sizes that belong together
extents        how images and sounds shrink: sizes that make whole patches or frames
published      sizes that a model's files name
sample_sizes   sizes of dimensions to try
trial          sample runs of a shard
liveness       which tensors are alive together, and how large they are
polynomials    sizes that were seen in runs -> polynomials
activations    live tensors -> formulas
sampler        sample runs of all shards -> shapes, live bytes
structure      an id for shards that are built alike, and their formulas
```
"""
