"""The definitions that everything else uses: a run's spec (`spec`, `inits`), its events and its errors.

Pydantic models and plain functions. Nothing here loads torch, because the API server uses them too and starts without
it. Nothing here imports another folder of the library.
"""
