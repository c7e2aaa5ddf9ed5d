"""Numbers about the whole service: counts that outlive every process, and gauges of this moment."""
