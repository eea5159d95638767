"""The list of mutations keeps up with the code."""
from mutate import MUTATIONS, misplaced


def test_every_mutation_has_its_place():
    """Each breaks text that stands in its file exactly once, and changes it."""
    assert misplaced() == [] and len(MUTATIONS) >= 60 and all(old != new for _, old, new in MUTATIONS)
