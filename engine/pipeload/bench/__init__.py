"""`pipeload bench`: pipeload beside other ways to run the same model, under the same limits, with checked answers.

```
cgroup      limits for a child process, and its usage
spec        the order to a contender's process, and its report
workload    a contender's work: seeded inputs, passes, decode steps, tasks
engines     the contenders behind one interface
contender   the program that runs one of them
bound       the program that profiles a model; the roofline from it
record      runs of one contender in one setting -> one record, with a check of its answers
launch      one contender in a process of its own, under its limits
harness     contenders x budgets x disks x rounds, each run in a process of its own
machine     the machine of the runs
table       records as a table
frame       a picture's title, notes and legend, above its panels
pictures    records as pictures (needs the extra [plot])
```
"""
