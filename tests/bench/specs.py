"""Random specs, as workloads and loads are written: `name:key=value,key=value`, or any text."""

from collections.abc import Mapping, Sequence

from hypothesis import strategies as st


def specs(
    kinds: Mapping[str, Sequence[str]], values: st.SearchStrategy[str], most_pairs: int
) -> st.SearchStrategy[str]:
    """Texts, and specs of these kinds with known keys and such values."""
    keys = sorted({key for keys in kinds.values() for key in keys})
    pairs = st.lists(st.tuples(st.sampled_from(keys), values), max_size=most_pairs)
    named = st.builds(
        lambda name, pairs: f"{name}:" + ",".join(f"{key}={value}" for key, value in pairs),
        st.sampled_from(sorted(kinds)),
        pairs,
    )
    return st.one_of(st.text(max_size=60), named)
