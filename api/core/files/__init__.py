"""Uploaded files: rows about them (`files`), their bytes (`storage`), space on disk, quotas, and checks of their rows.

Knows no jobs.
"""
