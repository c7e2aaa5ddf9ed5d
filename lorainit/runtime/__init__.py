"""The machine that a run uses: device, number formats, threads, the cache on disk, and the processes of one run.

Nothing here is about a model or about data. Imports `lorainit.config` and `lorainit.system` only.
"""
