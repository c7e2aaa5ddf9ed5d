"""The service on one machine as one process tree: `lorainit serve`."""
