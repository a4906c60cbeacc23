"""Counts in messages: one image, two images."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count, with what is counted.

    Args:
        one, many: the noun, and what else depends on the number; None for the regular plural.

    Example:
        >>> counted(1, "image"), counted(2, "test image"), counted(0, "class")
        ('1 image', '2 test images', '0 classes')
        >>> counted(1, "step is left", "steps are left")
        '1 step is left'
    """
    if many is None:
        many = f"{one}es" if one.endswith(("s", "x", "ch", "sh")) else f"{one}s"
    return f"{count} {one if count == 1 else many}"
