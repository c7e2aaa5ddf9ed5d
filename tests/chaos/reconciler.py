"""The product's reconciler, as the mutant that is asked for, if one is."""

from tests.chaos import mutants
from worker import reconciler

if __name__ == "__main__":
    mutants.apply()
    reconciler.main()
