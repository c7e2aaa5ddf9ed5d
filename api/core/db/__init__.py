"""The database: engine and sessions (`database`), tables (`tables`), pages of lists, and its migration.

Knows nothing of what the rows mean.
"""
