"""One linear layer: its frozen weight, in four bits or not, the adapter on it, and the matrices of experts.

Nothing here depends on the whole model, or on how an adapter was initialized.
"""
