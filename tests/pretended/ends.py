"""Which words of a case say that it ended well."""

WELL = (
    "ends checked",
    "the same bits",
    "factors differ by",
    "all refused",
    "2 put off, 0 batches cut",
    "told as device_failed",
    "told as out_of_memory",
)


def ends_well(found: str) -> bool:
    """Whether every part of what a case found is a good end; bold words never are."""
    return all("**" not in part and any(words in part for words in WELL) for part in found.split("; "))
