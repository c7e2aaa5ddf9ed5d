"""Uploaded files: their rows (`files`), their bytes (`storage`), disk space, quotas, and the checks of their content.

Knows no jobs.
"""
