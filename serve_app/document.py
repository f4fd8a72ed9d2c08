"""The HTML document around a page that needs no other file: its head, colours and tables.

Reports of tenants and the pages of bench are such documents.
"""

import html
import string

# Colours of text, plots and verdicts, for light and dark screens.
PALETTE = """\
:root {
  --paper: #ffffff; --ink: #16191d; --muted: #59616b; --grid: #e2e5e9; --bad: #b3420a;
  --good: #00775a; --series-0: #0067a5; --series-1: #c4500a; --series-2: #00896a;
  --series-3: #a5487f; --series-4: #8f6a00; --series-5: #59616b;
  --plot-font: system-ui, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e8eaed; --muted: #a0a8b2; --grid: #31373e; --bad: #ff9a5c;
    --good: #4cc9a4; --series-0: #62b5ec; --series-1: #ff9049; --series-2: #3fc79d;
    --series-3: #e398c5; --series-4: #e3bb3f; --series-5: #a0a8b2;
  }
}"""

_DOCUMENT = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$palette
body { margin: 0 auto; padding: 2.5rem 1.5rem; max-width: 75rem; font: 16px/1.5 var(--plot-font);
  color: var(--ink); background: var(--paper); }
p { color: var(--muted); max-width: 46rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
$style</style>
</head>
<body>
<h1>$title</h1>
$body</body>
</html>
""")


def document(title: str, body: str, style: str = "") -> str:
    """The document.

    Args:
        title: text.
        body: HTML below the heading.
        style: CSS of this page alone.
    """
    return _DOCUMENT.substitute(title=html.escape(title), body=body, style=style, palette=PALETTE)
