"""Do models much larger than a memory cap run under it, whole process and page cache included?"""
