"""Where a run happens: device, number formats, threads, the cache on disk, and the processes of one run.

Knows no model and no row. Imports `lorainit.config` and `lorainit.system` only.
"""
