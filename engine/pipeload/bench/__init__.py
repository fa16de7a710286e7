"""`pipeload bench`: pipeload beside other ways to run the same model, under the same limits, with checked answers.

```
cgroup      limits for a child process, and what it used
spec        what a contender's process is told, and what it tells
workload    what a contender is asked: seeded inputs, passes, decode steps, tasks
engines     the contenders behind one interface
contender   the program that runs one of them
bound       the program that profiles a model; the roofline from it
record      runs of one contender in one setting -> one record; is the answer right?
launch      one contender in a process of its own, under its limits
harness     contenders x budgets x disks x rounds, each run in a process of its own
machine     what it all ran on
table       records as a table
pictures    records as pictures (needs the extra [plot])
```
"""
