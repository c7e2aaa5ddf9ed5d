"""The half of the service that is not HTTP; all that the worker may import."""
