"""The SOURCE that a user names -> an ONNX graph and its side files.

```
task      tasks of models, and the transformers class of each
catalog   recipes for models by name, from packages or with seeded weights
hub       a model of the Hugging Face hub -> a local checkpoint folder
folder    the files of a checkpoint folder
external  the files beside an ONNX graph that hold its weights
sources   SOURCE -> a checkpoint, or an ONNX graph with its side files
identity  whether a later export would make the same files
tracing   a checkpoint -> an unsplit ONNX graph, in a child process
tracer    the program of that process
trace     a model of transformers -> a graph, by the library that runs on the installed transformers
by_optimum    by optimum, with transformers 4
by_torch  by torch's own exporter, with newer ones
hollow    a model whose weights stay in its checkpoint
places    where they lie there
left_out  its graph, and the place of each weight
steering  whether weights would change the trace
filling   its answers: weights are read for each operation
older_form    a checkpoint folder as the installed transformers reads it
widened   16-bit weights of a checkpoint as float32 files that are mapped
config_keys   which keys of config.json have a meaning
gguf      what a GGUF file says and transformers does not read
bare      a folder without a graph, as the engine's tasks read its files
tokenizer the tokenizer of a checkpoint as transformers makes it, and whether the engine makes the same ids
image_processor   the image processor of a checkpoint, likewise
beside    both of them for an ONNX graph, in a child process
gaps      weights of a checkpoint that do not fit its model
refused   what that process refuses
ropes     rotary positions that depend on the length, so that a trace follows them
asking    seeded inputs -> the answers of the checkpoint's own model, in a child process
reference the program of that process
sentences texts -> the vectors of sentence-transformers itself, in a child process
```
"""
