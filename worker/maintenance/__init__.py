"""The chores of the reconciler: what is deleted when, and checks of uploaded files."""
