"""The documents. `docs.generate` writes the parts of them that the code knows."""
