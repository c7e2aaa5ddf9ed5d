"""What is between a request and its route: keys, limits on bodies and on concurrency, threads, streams, metrics.

Knows requests and answers, but no single route.
"""
