"""What stands between a request and its route: keys, bounds on bodies and numbers, threads, streams, metrics.

Knows requests and answers, but no single route.
"""
