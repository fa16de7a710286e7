"""Are the files right, and their answers?

```
merge     the shards -> one graph over the same weights, to compare with
cases     seeded inputs that suit a model
chain     the shards one after another, and the unsplit graph, in plain onnxruntime
parts     the unsplit graph in bounded memory, where its weights lie in a checkpoint
compare   the answers of the two, and by how much they differ
padding   does padding on the left change the answers of a decoder that takes no positions?
graphs    is a shard's graph valid, and does it point to the weights of the manifest?
boundaries  lengths at which a model may change, from its config
questions   seeded inputs on both sides of them
beginning   what tells an input with another answer from those with the right one
running   does the engine open the finished directory, and run it?
parity    the answers of the finished directory, run by the engine, and of the checkpoint itself
vectors   the vectors of `embed`, and those of sentence-transformers
verify    files, graphs and answers of a sharded model directory
```
"""
