"""A record of every agent's work over time.

```
trace      spans and counters
stats      the record in figures
chrome     in a file, and back
timeline   in a picture
```
"""
