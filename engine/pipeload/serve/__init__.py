"""An HTTP server with OpenAI's interface over models under one memory budget: `pipeload serve`. Extra `serve`.

```
settings       what the user has asked for, and limits of requests
errors         failures -> answers in OpenAI's shape
bodies/        requests and answers
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
log            a line for each request
door           who may come in
images         pictures in requests
routes/        bodies -> calls of a model -> bodies
openapi        the routes, described for programs
server         all of it on a port, until SIGTERM
```
"""
