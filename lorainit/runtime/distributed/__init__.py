"""The processes that train one run together: how they start, how they meet, and how one of them ends all.

Also whose fault an error is when several runs share a process.
"""
