"""An ONNX graph that is made to be taken apart.

```
graph           nodes, and constants whose values stay where they are
runtime         a plain onnxruntime session
external_data   initializers that refer to a file
types           element types and shapes of every tensor
validity        is it valid ONNX?
from_checkpoint weights that are read from a checkpoint
load            a file -> a graph
normalise       constants folded, names resolved
```
"""
