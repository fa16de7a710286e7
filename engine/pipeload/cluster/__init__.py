"""Several machines that run one model together, over Dask distributed.

```
certificates  a CA and certificates; who may connect to what
settings      how the processes of a cluster use Dask
running       a loop that runs until a signal ends it
scheduler     the process that knows the nodes
offer         a node's offer: its budget, its models, its trust label
pace          whether a node has become slower with a model
store         a node's disk for files of other nodes, within a limit
sources       which nodes may send which file
fetching      takes them from there, in pieces
rates         a model's speed on a node: the kept profile, or measured there
links         how fast messages go from node to node
node          the process that runs stages: a Dask worker
messages      what nodes tell each other beside arrays; a node that was lost
stage         a range of shards on a node: a Dask actor
route         which arrays travel from stage to stage; pure
costs         what a stage costs on a node: times, memory, disk
placing       offers and profiles -> which node runs which stage
watch         which nodes are there
loop          the loop in which a client waits, in a thread of its own
ring          the stages of one placement, and the calls through them
calls         which ring calls go to, and which are on their way
history       the changes of a model's placement
rings         the present ring, and how another one takes its place
adapter       looks at the nodes, and moves the model
state         KV caches on the nodes, and the tokens to compute them again from
model         a model with the methods of `pipeload.Model`
nodes         what the nodes tell a client: models, files, speeds, links
connection    the cluster as a program sees it
connecting    `pipeload.connect`
```
"""
