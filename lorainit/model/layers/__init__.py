"""One linear layer: its frozen weight, in four bits or not, the adapter on it, and the matrices of experts.

Knows no model as a whole, and not how an adapter was initialized.
"""
