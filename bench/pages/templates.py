"""The templates of pages: text is escaped, and a name that is not given is an error."""

import functools
from pathlib import Path

import jinja2

FOLDER = Path(__file__).parent


@functools.cache
def environment() -> jinja2.Environment:
    """One for the process: it keeps the templates that it has compiled."""
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(FOLDER),
    )
