"""Numbers about the whole service: counters that survive restarts, and gauges of this moment."""
