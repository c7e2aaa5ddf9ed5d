"""The processes that train one run together: how they start, connect, and end together when one of them fails.

Also which run an error belongs to when several runs share a process.
"""
