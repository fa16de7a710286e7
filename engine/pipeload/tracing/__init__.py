"""What happened, and when.

```
trace      what every agent did
stats      in figures
chrome     to a file, and back
timeline   as a picture
```
"""
