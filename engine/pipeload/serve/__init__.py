"""An HTTP server with OpenAI's interface over models under one memory budget: `pipeload serve`. Extra `serve`.

```
settings       what the user has asked for, and limits of requests
errors         failures -> answers in OpenAI's shape
bodies/        requests and answers
intake         memory that bodies of requests hold
reading        bytes of a request -> a body
prefixes       KV caches of ended texts
models         models by name: opened, called, closed when idle
admission      places of calls; a client that goes away gives its place up
guided         grammars that answers follow
tools          functions that answers call
forms          the form of an answer: text, JSON, calls
sampling       a body -> options of `generate`
generation     prompts -> tokens as they come
stops          text up to a stop string
sse            events of a stream
metrics        figures for Prometheus
machine        memory, shards, and lanes of the latest sweep
page/          a page for people: files that a browser runs
log            a line for each request
door           who may come in
connections    ended where a request or the taking of an answer lasts too long
images         pictures in requests
routes/        bodies -> calls of a model -> bodies
openapi        the routes, described for programs
work           routes that call models, whose libraries come with the first call
application    all of it for a server of ASGI
handover       what an idle server leaves to the process that takes its place
port           the socket that listens, and connections of clients
server         the application on its port, until SIGTERM
```
"""

HANDOVER = "PIPELOAD_HANDOVER"
"""The environment variable by which a server tells the process that takes its place what it leaves."""
