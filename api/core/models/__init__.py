"""Which base models may be trained (`catalogue`), and what models are called (`registry`).

The tables of the database are in `api.core.db.tables`.
"""
