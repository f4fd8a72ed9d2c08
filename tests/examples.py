"""How many examples a property test tries: all of them, or a quarter in `make test-fast`."""

from typing import Any

from hypothesis import settings


def examples(count: int, **options: Any) -> settings:
    """The settings of a test that needs `count` examples to find what it is for."""
    fast = settings.get_current_profile_name() == "fast"
    return settings(max_examples=max(10, count // 4) if fast else count, **options)
