"""What the user names -> an ONNX graph and its side files.

```
task            what a model is for, and which transformers class that means
catalog         recipes for models by name, from packages or with seeded weights
hub             a model of the Hugging Face hub -> a local checkpoint folder
folder          what lies in a checkpoint folder
find            SOURCE -> a checkpoint, or an ONNX graph with its side files
to_onnx         a checkpoint -> an unsplit ONNX graph, in a child process
to_onnx_child   what that process does
```
"""
