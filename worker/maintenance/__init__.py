"""Chores of the reconciler: deleting what has expired, and checking uploaded files."""
