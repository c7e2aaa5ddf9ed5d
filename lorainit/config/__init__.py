"""The ground: what a run is (`spec`, `inits`), what it says (`events`) and what it refuses (`errors`).

Pydantic models and plain functions. The service reads them too, so nothing here loads torch,
and nothing here imports another folder of the library.
"""
