"""One self-contained HTML page: no script, no network, light and dark, on a phone and on paper.

`text.py` makes text from outside safe for HTML, Markdown, a terminal or matplotlib, and sets tables in each of them.
`figure.py` draws matplotlib figures as PNGs. `page.py` collects cards, notes, tables, charts and pictures, and renders
them with the Jinja templates in `templates/`. `bars.py` and `confusion.py` draw classes: a figure of each, and which
are taken for which.
"""
